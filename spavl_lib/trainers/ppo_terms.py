"""Compute rewards, advantages and losses of a rollout from PPO's settings and formulas.

The formulas are in `objectives.ppo`. Rows are indices into the rollout. The columns
`scores` and `costs` hold one value for each row. All other columns hold one value for each response
token, so their shape is (rows, width).
"""

import torch
from torch import Tensor

from spavl_lib.config import PPOConfig
from spavl_lib.errors import NonFiniteError
from spavl_lib.modelling.load import logit_rounding
from spavl_lib.objectives.lagrangian import LagrangeMultiplier
from spavl_lib.objectives.ppo import (
    approx_kl,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_penalty_rewards,
    masked_mean,
    masked_whiten,
)
from spavl_lib.trainers.guards import REMEDY
from spavl_lib.trainers.rollout import Rollout


def check_finite(rollout: Rollout, step: int) -> None:
    """Raise if any number of a rollout is NaN or infinite, before anything is updated.

    Args:
        rollout: The rollout, with its columns.
        step: Number of the step, from 1.

    Raises:
        NonFiniteError: A number is NaN or infinite. The message names the column and up to ten
            rows.
    """
    for name, values in rollout.columns.items():
        bad = ~torch.isfinite(values).reshape(len(rollout), -1).all(1)
        if bad.any():
            ids = [rollout.prompts[i].row_id for i in bad.nonzero().flatten().tolist()]
            raise NonFiniteError(
                f"step {step}: {name} is not finite on rows {', '.join(ids[:10])}; {REMEDY}"
            )


def add_advantages(
    rollout: Rollout,
    settings: PPOConfig,
    kl_coef: float,
    multiplier: LagrangeMultiplier | None = None,
) -> None:
    """Add the columns `rewards`, `advantages` and `returns` to a rollout.

    The reward of each token is minus its KL penalty. The reward of a response's last token also
    includes the score, minus the penalties for length and for a missing EOS. With a multiplier, the
    score is the weighted difference of reward and cost.

    Args:
        rollout: A rollout with `scores` (rows,) and `logps`, `ref_logps`, `values` (rows, width).
        settings: Settings of PPO: penalties, discount and whitening.
        kl_coef: The KL coefficient, in units of reward for each nat.
        multiplier: The Lagrange multiplier, which needs the column `costs` (rows,). None without a
            cost limit.
    """
    columns, mask = rollout.columns, rollout.mask
    lengths = mask.sum(1)
    finished = torch.tensor(rollout.finished)
    scores = columns["scores"]
    if multiplier:
        scores = multiplier.scores(scores, columns["costs"])
    scores = scores - settings.length_penalty * lengths
    scores = scores - settings.missing_eos_penalty * ~finished
    rewards = kl_penalty_rewards(
        scores, columns["logps"], columns["ref_logps"], mask,
        kl_coef=kl_coef, kind=settings.kl_estimator,
    )  # fmt: skip
    if settings.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(
        rewards, columns["values"], mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda
    )
    rollout.mean_advantage = masked_mean(advantages, mask).item()  # whitening makes this mean 0
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    columns |= {"rewards": rewards, "advantages": advantages, "returns": returns}


def policy_loss(
    rollout: Rollout, rows: list[int], outputs: tuple[Tensor, ...], settings: PPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """Compute the clipped policy loss minus the entropy bonus, a mean over the response tokens.

    Args:
        rollout: The rollout, with advantages.
        rows: Rows of a micro-batch.
        outputs: The policy's log-probabilities and entropies, both (rows, width), in nats.
        settings: Clip range and weight of the entropy bonus.

    Returns:
        The loss (), with a gradient, and the values to log.
    """
    logps, entropy = outputs
    old, advantages, mask = _columns(rollout, rows, logps, "logps", "advantages")
    clipped = clipped_policy_loss(logps, old, advantages, mask, clip_range=settings.clip_range)
    mean_entropy = masked_mean(entropy, mask)
    loss = clipped.loss - settings.entropy_coef * mean_entropy
    ratio = torch.exp((logps - old).detach())
    return loss, {
        "loss/policy_avg": clipped.loss.item(),
        "policy/clipfrac_avg": clipped.clip_fraction.item(),
        "policy/approxkl_avg": approx_kl(logps.detach(), old, mask).item(),
        "policy/entropy_avg": mean_entropy.item(),
        "val/ratio": masked_mean(ratio, mask).item(),
        "val/ratio_error": ((ratio - 1).abs() * mask).max().item(),
    }


def value_loss(
    rollout: Rollout, rows: list[int], outputs: tuple[Tensor, ...], settings: PPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """Compute the weighted value loss, a mean over the response tokens.

    Args:
        rollout: The rollout, with returns.
        rows: Rows of a micro-batch.
        outputs: A tuple of one tensor, the values (rows, width).
        settings: Value clip range and weight of the loss.

    Returns:
        The loss (), with a gradient, and the values to log.
    """
    (values,) = outputs
    old, returns, mask = _columns(rollout, rows, values, "values", "returns")
    clipped = clipped_value_loss(
        values, old, returns, mask, value_clip_range=settings.value_clip_range
    )
    return settings.vf_coef * clipped.loss, {
        "loss/value_avg": clipped.loss.item(),
        "val/clipfrac_avg": clipped.clip_fraction.item(),
    }


def _columns(rollout: Rollout, rows: list[int], like: Tensor, *names: str) -> tuple[Tensor, ...]:
    """Return rows of the named columns and of the mask, with the width and device of `like`."""
    values = (*(rollout.columns[name] for name in names), rollout.mask)
    return tuple(value[rows, : like.shape[1]].to(like.device) for value in values)


def logit_error(logps: Tensor, old: Tensor, mask: Tensor) -> float:
    """Estimate the error of the logits, in nats, from two measurements of log-probabilities.

    An error e in the logit of a token with probability p changes the token's log-probability by
    about e (1 - p). If the token is almost certain, this change is almost 0. The size of all
    changes is therefore divided by the size of the changes that an error of 1 nat would cause.

    Args:
        logps: Log-probabilities (rows, width).
        old: An earlier measurement of the same log-probabilities (rows, width).
        mask: True on response tokens (rows, width).

    Returns:
        sqrt(sum (logps - old)^2 / sum (1 - p)^2), over the response tokens.
    """
    moved = ((logps - old)[mask].double()).square().sum()
    return float((moved / (1 - old[mask].double().exp()).square().sum().clamp_min(1e-12)).sqrt())


def check_first_ratio(
    rollout: Rollout, rows: list[int], logps: Tensor, step: int, dtype: torch.dtype
) -> None:
    """Check before a rollout's first update that the policy's log-probabilities have not changed.

    The rollout and the update compute a row in different batches, so rounding alone causes small
    differences. In fp32 the probability ratio of every token must lie within 1e-4 of 1. In 16 bits,
    rounding can change the ratio of a single token by 0.04 or more, and the largest error grows
    with the number of tokens. A fault, however, moves most tokens. In 16 bits the check thus uses
    `logit_error`, a mean over all tokens, and `logit_rounding` is the largest allowed value.

    Args:
        rollout: The rollout, with the log-probabilities that were computed when it was made.
        rows: Rows of the micro-batch.
        logps: The policy's log-probabilities of these rows (rows, width).
        step: Number of the step, from 1.
        dtype: Precision of the forward passes, which decides the tolerance.

    Raises:
        AssertionError: The log-probabilities have changed: dropout is on, or rollout and update
            compute differently.
    """
    old, mask = _columns(rollout, rows, logps, "logps")
    logps = logps.detach()
    if dtype == torch.float32:
        name, allowed = "probability ratios", 1e-4
        error = ((torch.exp(logps - old) - 1).abs() * mask).max().item()
    else:
        name, allowed = "logits", logit_rounding(dtype)
        error = logit_error(logps, old, mask)
    if error > allowed:
        raise AssertionError(
            f"step {step}: before any update the policy's {name} are off by {error:.2e} "
            f"(allowed {allowed:.0e}); is dropout on?"
        )
