"""PPO's formulas at their edges: one token, no whitening of the mean, values beyond the clip."""

import pytest
import torch

from spavl_lib.objectives.ppo import (
    KLController,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_penalty_rewards,
    masked_whiten,
)


def test_a_response_of_one_token_has_one_advantage() -> None:
    rewards, values = torch.tensor([[2.0], [0.5]]), torch.tensor([[0.5], [1.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    assert advantages.tolist() == [[1.5], [-0.5]]  # reward minus value; nothing comes after
    assert returns.tolist() == [[2.0], [0.5]]


def test_the_value_after_the_last_token_is_zero() -> None:
    values = torch.tensor([[10.0, 20.0, 30.0]])
    rewards, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.0)
    assert advantages.tolist() == [[10.0, 10.0, -30.0]]


def test_whitening_without_a_shift_keeps_the_mean() -> None:
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    whitened = masked_whiten(values, mask, shift_mean=False)
    scaled = (torch.tensor([1.0, 3.0, 5.0, 7.0]) - 4.0) / 5.0**0.5 + 4.0
    assert whitened[mask].tolist() == pytest.approx(scaled.tolist(), abs=1e-5)
    assert whitened[~mask].tolist() == [0.0, 0.0]
    shifted = masked_whiten(values, mask)
    assert shifted[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert shifted[mask].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "moved"), [(5.0, 1.2), (1.1, 1.1), (-5.0, 0.8), (0.9, 0.9)], ids=str
)
def test_a_value_counts_as_no_further_from_the_old_one_than_the_clip(
    value: float, moved: float
) -> None:
    target, mask = 3.0, torch.ones(1, 1, dtype=torch.bool)
    loss, fraction = clipped_value_loss(
        torch.tensor([[value]]), torch.tensor([[1.0]]), torch.tensor([[target]]), mask,
        value_clip_range=0.2,
    )  # fmt: skip
    plain, clipped = (value - target) ** 2, (moved - target) ** 2
    assert loss.item() == pytest.approx(0.5 * max(plain, clipped), abs=1e-5)
    assert fraction.item() == float(clipped > plain + 1e-6)


def test_the_score_lies_on_the_last_token_whatever_the_padding() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    zeros = torch.zeros(3, 3)
    rewards = kl_penalty_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, mask, kl_coef=0.5)
    assert rewards.tolist() == [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_explained_variance_counts_response_tokens_alone() -> None:
    returns = torch.tensor([[1.0, 3.0, 50.0]])
    values = torch.tensor([[1.5, 2.5, -50.0]])
    mask = torch.tensor([[True, True, False]])
    # errors -0.5 and 0.5: variance 0.25; returns 1 and 3: variance 1
    assert explained_variance(values, returns, mask) == pytest.approx(0.75)


def test_a_resumed_controller_steers_on_from_its_coefficient() -> None:
    first = KLController(0.1, target=2.0, horizon=100)
    first.update(4.0, 10)  # twice the target: the error is cut to 0.2
    assert first.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    second = KLController(0.1, target=2.0, horizon=100)
    second.load_state_dict(first.state_dict())
    assert second.kl_coef == first.kl_coef
    second.update(1.0, 10)  # half of it: cut to -0.2
    assert second.kl_coef == pytest.approx(first.kl_coef * (1 - 0.2 * 10 / 100))
    fixed = KLController(0.1)
    fixed.update(1e3, 10)
    assert fixed.kl_coef == 0.1


@pytest.mark.parametrize(("value", "target", "clipped"), [(2.9, 3.0, 2.2), (1.1, 0.0, 1.8)])
def test_a_clipped_value_is_old_value_plus_the_clipped_change(
    value: float, target: float, clipped: float
) -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = clipped_value_loss(
        torch.tensor([[value]]), torch.tensor([[2.0]]), torch.tensor([[target]]), mask,
        value_clip_range=0.2,
    )  # fmt: skip
    assert result.loss.item() == pytest.approx(0.5 * (clipped - target) ** 2)


def test_rewards_stay_on_the_device_of_the_response() -> None:
    """On the device `meta` nothing can be mixed with a tensor of the CPU without an error."""
    tokens = torch.zeros(2, 3, device="meta")
    mask = torch.ones(2, 3, dtype=torch.bool, device="meta")
    rewards = kl_penalty_rewards(tokens[:, 0], tokens, tokens, mask, kl_coef=0.1)
    assert rewards.device.type == "meta" and rewards.shape == (2, 3)


@pytest.mark.parametrize("answers", [99, 100, 101, 500, 501, 6400])
@pytest.mark.parametrize("kl", [0.0, 1.9, 4.0])
def test_a_nat_never_pays(answers: int, kl: float) -> None:
    """A negative coefficient would reward moving away from the reference."""
    controller = KLController(0.1, target=2.0, horizon=100)
    error = max(-0.2, min(0.2, kl / 2.0 - 1))
    controller.update(kl, answers)
    assert controller.kl_coef == pytest.approx(0.1 * (1 + error * min(1.0, answers / 100)))
    for _ in range(50):
        controller.update(kl, answers)
    assert controller.kl_coef > 0
