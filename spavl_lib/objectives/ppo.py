"""The formulas of PPO, each a pure function of (batch, response) tensors.

Notation: `batch` is the number of responses, `response` the number of tokens in the longest one.
`mask` is True for tokens of the response, EOS included, and False for padding. The value at
position t is the value of the state before token t. The reward at position t is given for token t.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Tokens = Float[Tensor, "batch response"]
Mask = Bool[Tensor, "batch response"]


def masked_mean(values: Tokens, mask: Mask) -> Float[Tensor, ""]:
    """Mean over the response tokens of the whole batch; 0 if there are no response tokens."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tokens, mask: Mask, *, shift_mean: bool = True) -> Tokens:
    """Scale values to variance 1 over the response tokens of the batch.

    Args:
        values: One value for each token.
        mask: Response tokens.
        shift_mean: Whether to also shift the mean to 0. Advantages are shifted, rewards are not.

    Returns:
        Scaled values, 0 on padding.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), whiten() in the paper's code.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def kl_estimate(logps: Tokens, ref_logps: Tokens, *, kind: str) -> Tokens:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled, in nats.

    Args:
        logps: Log-probabilities under the policy, in nats.
        ref_logps: Log-probabilities under the reference, in nats.
        kind: ``k1`` is the log ratio, which is unbiased and has either sign. ``k3`` is
            r - 1 - log r with r = reference / policy, which is unbiased, never negative, and has
            less variance.

    Raises:
        ValueError: Unknown kind.

    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = logps - ref_logps
    if kind == "k1":
        return log_ratio
    if kind == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"unknown KL estimator {kind!r}; expected 'k1' or 'k3'")


def kl_penalty_rewards(
    scores: Float[Tensor, " batch"],
    logps: Tokens,
    ref_logps: Tokens,
    mask: Mask,
    *,
    kl_coef: float,
    kind: str = "k1",
) -> Tokens:
    """Reward of each token: the negative KL penalty, plus the score at the last token.

    Args:
        scores: The reward model's score of each response.
        logps: Log-probabilities under the policy that sampled, in nats.
        ref_logps: Log-probabilities under the reference, in nats.
        mask: Response tokens.
        kl_coef: The KL coefficient, at least 0, in units of reward per nat.
        kind: Estimator of the KL, as in `kl_estimate`.

    Returns:
        Rewards, 0 on padding. A response without tokens has no reward, so its score is lost.

    Source: Ouyang et al. 2022, arXiv:2203.02155, Eq. 2.
    """
    rewards = -kl_coef * kl_estimate(logps, ref_logps, kind=kind) * mask
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1)
    is_last = (positions[None, :] == last[:, None]) & mask
    return rewards + is_last * scores[:, None]


class Advantages(NamedTuple):
    """Advantages, and returns = advantages + values; both 0 on padding."""

    advantages: Tokens
    returns: Tokens


def gae(
    rewards: Tokens, values: Tokens, mask: Mask, *, gamma: float, gae_lambda: float
) -> Advantages:
    """Generalised advantage estimation. The value after the last response token is 0.

    Args:
        rewards: Reward of each token.
        values: Value of the state before each token.
        mask: Response tokens, contiguous from the first position.
        gamma: Discount of later rewards, 0 to 1.
        gae_lambda: 0 to 1. With 1 the advantage is the discounted sum of rewards minus the value,
            which has no bias. With 0 it is the one-step TD error, which has little variance.

    Source: Schulman et al. 2015, arXiv:1506.02438, Eq. 16.
    """
    keep = mask.to(values.dtype)
    advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * gae_lambda * advantage) * keep[:, t]
        next_value = values[:, t] * keep[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return Advantages(advantages, (advantages + values) * keep)


class ClippedLoss(NamedTuple):
    """Mean loss over response tokens, and the share of tokens for which the clip was active."""

    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]


def clipped_policy_loss(
    logps: Tokens, old_logps: Tokens, advantages: Tokens, mask: Mask, *, clip_range: float
) -> ClippedLoss:
    """PPO's clipped surrogate objective, as a loss.

    Args:
        logps: Log-probabilities under the policy that is updated, in nats.
        old_logps: Log-probabilities under the policy that sampled, in nats.
        advantages: Advantage of each token, detached.
        mask: Response tokens.
        clip_range: Largest distance of the probability ratio from 1 that still lowers the loss,
            such as 0.2.

    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7.
    """
    ratio = torch.exp(logps - old_logps)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    return ClippedLoss(loss, masked_mean((clipped > plain).to(ratio.dtype), mask).detach())


def clipped_value_loss(
    values: Tokens, old_values: Tokens, returns: Tokens, mask: Mask, *, value_clip_range: float
) -> ClippedLoss:
    """Half the squared error of each value or of its clipped value, whichever error is larger.

    Args:
        values: Values of the model that is updated.
        old_values: Values at the time of the rollout.
        returns: Returns of the rollout, which are the targets.
        mask: Response tokens.
        value_clip_range: Largest distance of a clipped value from its old value, in units of
            reward. 0 disables the clip.

    Source: the code of Ziegler et al. 2019 (arXiv:1909.08593). The clip is from OpenAI Baselines'
    ppo2.
    """
    plain = (values - returns) ** 2
    if value_clip_range <= 0:
        return ClippedLoss(0.5 * masked_mean(plain, mask), torch.zeros((), device=values.device))
    near_old = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    clipped = (near_old - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask)
    return ClippedLoss(loss, masked_mean((clipped > plain).to(values.dtype), mask).detach())


def approx_kl(logps: Tokens, old_logps: Tokens, mask: Mask) -> Float[Tensor, ""]:
    """Mean k3 estimate of KL(policy that sampled || current policy), in nats per token.

    Args:
        logps: Log-probabilities under the current policy, in nats.
        old_logps: Log-probabilities under the policy that sampled, in nats.
        mask: Response tokens.
    """
    return masked_mean(kl_estimate(old_logps, logps, kind="k3"), mask).detach()


def explained_variance(values: Tokens, returns: Tokens, mask: Mask) -> float:
    """1 - Var(returns - values) / Var(returns) over response tokens.

    Args:
        values: Values at the time of the rollout.
        returns: Returns of the rollout.
        mask: Response tokens.

    Returns:
        1 if values equal returns, 0 if values are no better than a constant, below 0 if they are
        worse. NaN if all returns are equal.
    """
    error = (returns - values)[mask]
    variance = returns[mask].var(unbiased=False).item()
    return 1 - error.var(unbiased=False).item() / variance if variance > 0 else float("nan")


class KLController:
    """The KL coefficient: fixed, or adapted so that the measured KL approaches a target.

    Args:
        kl_coef: The coefficient at the start, in units of reward per nat.
        target: The target, a mean KL per response in nats. 0 keeps the coefficient fixed.
        horizon: Number of responses after which the coefficient has changed by about 20 % at most.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, kl_coef: float, *, target: float = 0.0, horizon: int = 1000):
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Adapt the coefficient.

        One update changes the coefficient by at most a fifth. It therefore stays above 0 even if
        more responses than the horizon are measured at once.

        Args:
            kl: Measured mean KL per response, in nats.
            num_samples: Number of responses over which `kl` was measured.
        """
        if self.target > 0:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.kl_coef *= 1 + error * min(num_samples, self.horizon) / self.horizon

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load the result of `state_dict`."""
        self.kl_coef = state["kl_coef"]
