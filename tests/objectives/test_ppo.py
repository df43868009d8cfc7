"""PPO's pieces against numbers worked by hand and against brute force."""

import math

import pytest
import torch

from spavl_lib.objectives.ppo import (
    KLController,
    approx_kl,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_estimate,
    kl_penalty_rewards,
    masked_mean,
    masked_whiten,
)

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def test_the_score_lands_on_the_true_last_token() -> None:
    """Five columns, answers of 3, 5 and 1 tokens; a penalty of 0.5 a nat."""
    logps = torch.tensor([[-1.0, -2, -3, 9, 9], [-1, -1, -1, -1, -1], [-4, 9, 9, 9, 9]])
    ref = torch.tensor([[-1.0, -1, -5, 0, 0], [-1, -1, -1, -1, -3], [-4, 0, 0, 0, 0]])
    rewards = kl_penalty_rewards(
        torch.tensor([10.0, 20.0, 30.0]), logps, ref, MASK, kl_coef=0.5, kind="k1"
    )
    expected = [[0, 0.5, 10 - 1.0, 0, 0], [0, 0, 0, 0, 20 - 1.0], [30, 0, 0, 0, 0]]
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float32))


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    logps, ref, values = (torch.randn(3, 5) for _ in range(3))
    scores = torch.randn(3)

    def everything(width: int) -> list[torch.Tensor]:
        def wide(x: torch.Tensor, fill: float) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, width), value=fill)

        mask = wide(MASK.float(), 0).bool()
        rewards = kl_penalty_rewards(scores, wide(logps, 7.0), wide(ref, -7.0), mask, kl_coef=0.1)
        found = gae(rewards, wide(values, 99.0), mask, gamma=0.9, gae_lambda=0.8)
        white = masked_whiten(found.advantages, mask)
        policy = clipped_policy_loss(wide(logps, 3.0), wide(ref, 0.0), white, mask, clip_range=0.2)
        value = clipped_value_loss(
            wide(values, 9.0), wide(values + 0.1, 1.0), found.returns, mask, value_clip_range=0.2
        )
        return [rewards[:, :5], found.advantages[:, :5], white[:, :5], policy.loss, value.loss]

    for narrow, padded in zip(everything(0), everything(13), strict=True):
        torch.testing.assert_close(narrow, padded, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.95, 0.0])
def test_gae_is_the_sum_it_stands_for(gamma: float, gae_lambda: float) -> None:
    """Sum over l of (gamma lambda)^l delta_(t+l), row by row, in plain Python."""
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    found = gae(rewards * MASK, values, MASK, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate((3, 5, 1)):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            power = gamma * gae_lambda
            expected = sum(power**k * d for k, d in enumerate(deltas[t:]))
            assert found.advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            if gae_lambda == 1.0:  # the return, whatever the values are
                paid = rewards[row, t:length].tolist()
                total = sum(gamma**k * r for k, r in enumerate(paid))
                assert found.returns[row, t].item() == pytest.approx(total, abs=1e-5)
    assert (found.advantages[~MASK] == 0).all() and (found.returns[~MASK] == 0).all()


def test_the_policy_clip_against_brute_force() -> None:
    torch.manual_seed(2)
    old, advantages = torch.randn(3, 5), torch.randn(3, 5)
    logps = old + 0.5 * torch.randn(3, 5)
    total, clipped = 0.0, 0
    for i, j in MASK.nonzero().tolist():
        ratio = math.exp(logps[i, j] - old[i, j])
        a = advantages[i, j].item()
        best = min(a * ratio, a * min(max(ratio, 0.8), 1.2))
        total, clipped = total - best, clipped + (best < a * ratio - 1e-7)
    found = clipped_policy_loss(logps, old, advantages, MASK, clip_range=0.2)
    assert found.loss.item() == pytest.approx(total / 9, abs=1e-5)
    assert 0 < clipped < 9 and found.clip_fraction.item() == pytest.approx(clipped / 9)


def test_a_policy_that_has_not_moved_has_ratio_one() -> None:
    torch.manual_seed(3)
    logps, advantages = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    found = clipped_policy_loss(logps, logps.detach(), advantages, MASK, clip_range=0.2)
    assert found.clip_fraction == 0
    assert found.loss.item() == pytest.approx(-masked_mean(advantages, MASK).item(), abs=1e-6)
    found.loss.backward()
    torch.testing.assert_close(logps.grad, -advantages * MASK / 9)
    assert approx_kl(logps.detach(), logps.detach(), MASK) == 0


def test_the_value_clip_takes_the_worse_of_both() -> None:
    old, returns = torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])
    values, mask = torch.tensor([[0.9, 0.1]]), torch.ones(1, 2, dtype=torch.bool)
    found = clipped_value_loss(values, old, returns, mask, value_clip_range=0.2)
    assert found.loss.item() == pytest.approx(0.5 * (0.8**2 + 0.9**2) / 2)
    assert found.clip_fraction.item() == 0.5
    free = clipped_value_loss(values, old, returns, mask, value_clip_range=0.0)
    assert free.loss.item() == pytest.approx(0.5 * (0.1**2 + 0.9**2) / 2)


def test_kl_estimates_average_to_the_exact_kl() -> None:
    torch.manual_seed(4)
    policy = torch.log_softmax(torch.randn(5), 0)
    reference = torch.log_softmax(torch.randn(5), 0)
    exact = (policy.exp() * (policy - reference)).sum().item()
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True)[None]
    for kind in ("k1", "k3"):
        found = kl_estimate(policy[drawn], reference[drawn], kind=kind)
        error = found.std().item() / math.sqrt(found.numel())
        assert abs(found.mean().item() - exact) < 3 * error and exact > 10 * error
        assert (kl_estimate(policy[drawn], policy[drawn], kind=kind) == 0).all()
    assert (kl_estimate(policy[drawn], reference[drawn], kind="k3") >= 0).all()
    with pytest.raises(ValueError, match="k2"):
        kl_estimate(policy[drawn], reference[drawn], kind="k2")


def test_whitening_over_answer_tokens_only() -> None:
    torch.manual_seed(5)
    white = masked_whiten(3 + 2 * torch.randn(3, 5), MASK)
    kept = white[MASK]
    assert kept.mean().abs() < 1e-6 and abs(kept.std(unbiased=False) - 1) < 1e-5
    assert (white[~MASK] == 0).all()


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]])
    assert explained_variance(returns, returns, MASK) == 1
    flat = torch.full_like(returns, returns[MASK].mean().item())
    assert explained_variance(flat, returns, MASK) == pytest.approx(0, abs=1e-6)
    assert math.isnan(explained_variance(flat, flat, MASK))


def test_the_controller_steers_towards_its_target() -> None:
    fixed = KLController(0.1)
    fixed.update(50.0, 16)
    assert fixed.kl_coef == 0.1
    steered = KLController(0.1, target=6.0, horizon=100)
    steered.update(12.0, 10)
    assert steered.kl_coef == pytest.approx(0.1 * 1.02)  # the error is held to 0.2
    again = KLController(0.5, target=6.0)
    again.load_state_dict(steered.state_dict())
    steered.update(3.0, 10)
    assert again.kl_coef > steered.kl_coef
