"""PPO's pieces, each a pure function of (batch, response) tensors.

Notation: `batch` answers, `response` token positions of the longest; `mask` is True where a
position holds a token of the answer, its EOS included. Values and rewards at position t belong to
the state before token t was said.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Tokens = Float[Tensor, "batch response"]
Mask = Bool[Tensor, "batch response"]


def masked_mean(values: Tokens, mask: Mask) -> Float[Tensor, ""]:
    """Mean over the answer tokens of the whole batch; 0 if there are none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tokens, mask: Mask, *, shift_mean: bool = True) -> Tokens:
    """Values scaled to unit variance over the answer tokens, and shifted to mean 0 if asked.

    Padding neither counts nor changes: it comes out 0.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def kl_estimate(logps: Tokens, ref_logps: Tokens, *, kind: str) -> Tokens:
    """Per-token estimate of KL(policy || reference) from tokens the policy sampled, in nats.

    Args:
        logps: Under the policy.
        ref_logps: Under the reference.
        kind: ``k1``: log ratio, unbiased, of either sign. ``k3``: r - 1 - log r with
            r = reference / policy; unbiased, never negative, less spread.

    Raises:
        ValueError: Another kind.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = logps - ref_logps
    if kind == "k1":
        return log_ratio
    if kind == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"KL estimator {kind!r}: expected 'k1' or 'k3'")


def kl_penalty_rewards(
    scores: Float[Tensor, " batch"],
    logps: Tokens,
    ref_logps: Tokens,
    mask: Mask,
    *,
    kl_coef: float,
    kind: str = "k1",
) -> Tokens:
    """Reward of each token: minus the KL penalty, and the answer's score on its true last token.

    Args:
        scores: The reward model's score of each whole answer.
        logps: Under the policy that sampled.
        ref_logps: Under the reference.
        mask: Answer tokens.
        kl_coef: Price of a nat, >= 0.
        kind: As `kl_estimate`.

    Returns:
        0 on padding. An answer without tokens gets nothing.

    Source: Ouyang et al. 2022, arXiv:2203.02155, Eq. 2.
    """
    rewards = -kl_coef * kl_estimate(logps, ref_logps, kind=kind) * mask
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1)
    is_last = (positions[None, :] == last[:, None]) & mask
    return rewards + is_last * scores[:, None]


class Advantages(NamedTuple):
    """What GAE gives: advantages, and returns = advantages + values. 0 on padding."""

    advantages: Tokens
    returns: Tokens


def gae(
    rewards: Tokens, values: Tokens, mask: Mask, *, gamma: float, gae_lambda: float
) -> Advantages:
    """Generalised advantage estimation; the value after the last answer token is 0.

    Args:
        rewards: Of each token.
        values: V(state before token t).
        mask: Answer tokens, contiguous.
        gamma: Discount, 0..1.
        gae_lambda: 1: return minus value, no bias; 0: one-step error, little variance.

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
    """A mean loss over answer tokens, and the share of tokens on which the clip acted."""

    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]


def clipped_policy_loss(
    logps: Tokens, old_logps: Tokens, advantages: Tokens, mask: Mask, *, clip_range: float
) -> ClippedLoss:
    """PPO's clipped surrogate, as a loss.

    Args:
        logps: Under the policy being updated.
        old_logps: Under the policy that sampled.
        advantages: Of each token, detached.
        mask: Answer tokens.
        clip_range: How far the probability ratio may profit from moving, such as 0.2.

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
    """Half the squared error of the values, which may not move further than the clip range.

    Args:
        values: Of the model being updated.
        old_values: At rollout.
        returns: What they should be.
        mask: Answer tokens.
        value_clip_range: In units of reward; 0 for no clip.

    Source: Ouyang et al. 2022 (arXiv:2203.02155) and their predecessors' code.
    """
    plain = (values - returns) ** 2
    if value_clip_range <= 0:
        return ClippedLoss(0.5 * masked_mean(plain, mask), torch.zeros((), device=values.device))
    moved = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    clipped = (moved - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask)
    return ClippedLoss(loss, masked_mean((clipped > plain).to(values.dtype), mask).detach())


def approx_kl(logps: Tokens, old_logps: Tokens, mask: Mask) -> Float[Tensor, ""]:
    """Mean k3 estimate of the KL between the policy and the one that sampled, in nats a token."""
    return masked_mean(kl_estimate(old_logps, logps, kind="k3"), mask).detach()


def explained_variance(values: Tokens, returns: Tokens, mask: Mask) -> float:
    """1 - Var(returns - values) / Var(returns) over answer tokens; NaN if returns do not vary."""
    kept_returns, error = returns[mask], (returns - values)[mask]
    variance = kept_returns.var(unbiased=False).item()
    return 1 - error.var(unbiased=False).item() / variance if variance > 0 else float("nan")


class KLController:
    """The KL price: fixed, or steered so that the measured KL nears a target.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, kl_coef: float, *, target: float = 0.0, horizon: int = 1000):
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Steer by the mean KL of an answer, in nats, seen over `num_samples` answers."""
        if self.target > 0:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.kl_coef *= 1 + error * num_samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of `state_dict`."""
        self.kl_coef = state["kl_coef"]
