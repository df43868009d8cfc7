"""From a rollout to rewards, advantages and losses: where PPO's settings meet its formulas.

The formulas are in `objectives.ppo`. Rows are indices into the rollout; the columns of its tensors
are answer tokens, so a column has the shape (rows, width).
"""

import torch
from torch import Tensor

from spavl_lib.config import PPOConfig
from spavl_lib.errors import NonFiniteError
from spavl_lib.modelling.load import logit_rounding
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
        NonFiniteError: Names the column and up to ten rows.
    """
    for name, values in rollout.columns.items():
        bad = ~torch.isfinite(values).reshape(len(rollout), -1).all(1)
        if bad.any():
            ids = [rollout.prompts[i].row_id for i in bad.nonzero().flatten().tolist()]
            raise NonFiniteError(
                f"step {step}: {name} is not finite on rows {', '.join(ids[:10])}; {REMEDY}"
            )


def add_advantages(rollout: Rollout, settings: PPOConfig, kl_coef: float) -> None:
    """Add the columns `rewards`, `advantages` and `returns` to a rollout.

    An answer's score, less the penalties, is paid at its last token; the KL penalty at every token.

    Args:
        rollout: A rollout with `scores` (rows,) and `logps`, `ref_logps`, `values` (rows, width).
        settings: Penalties, discount and whitening.
        kl_coef: The KL coefficient, in units of reward for each nat.
    """
    columns, mask = rollout.columns, rollout.mask
    lengths = mask.sum(1)
    finished = torch.tensor(rollout.finished)
    scores = columns["scores"] - settings.length_penalty * lengths
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
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    columns |= {"rewards": rewards, "advantages": advantages, "returns": returns}


def policy_loss(
    rollout: Rollout, rows: list[int], outputs: tuple[Tensor, ...], settings: PPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """The clipped policy loss less the entropy bonus, as a mean over the rows' answer tokens.

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
    """The weighted value loss, as a mean over the rows' answer tokens.

    Args:
        rollout: The rollout, with returns.
        rows: As for `policy_loss`, which also says what is returned.
        outputs: The values (rows, width), alone in a tuple.
        settings: Value clip range and weight of the loss.
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
    """Columns of some rows and their mask, as wide as `like` and on its device."""
    values = (*(rollout.columns[name] for name in names), rollout.mask)
    return tuple(value[rows, : like.shape[1]].to(like.device) for value in values)


def logit_error(logps: Tensor, old: Tensor, mask: Tensor) -> float:
    """How far the logits behind two measurements of the same tokens lie apart, in nats.

    A logit's error e moves a token's log-probability by about e (1 - p): a token that is almost
    certain shows nothing of it. So the differences are compared with what an error of 1 would make.

    Args:
        logps: Log-probabilities (rows, width).
        old: The same, measured before (rows, width).
        mask: True on answer tokens (rows, width).

    Returns:
        sqrt(sum (logps - old)^2 / sum (1 - p)^2), over the answer tokens.
    """
    moved = ((logps - old)[mask].double()).square().sum()
    return float((moved / (1 - old[mask].double().exp()).square().sum().clamp_min(1e-12)).sqrt())


def check_first_ratio(
    rollout: Rollout, rows: list[int], logps: Tensor, step: int, dtype: torch.dtype
) -> None:
    """Check that before the first update of a rollout the policy is the one that sampled it.

    In fp32 no token's ratio may be off by 1e-4. In 16 bit single ratios may be off by 0.04 and more
    although nothing is wrong, since sampling and updates compute other batches, and the size of the
    largest error grows with the number of tokens. A fault moves most tokens, so there `logit_error`
    is compared with what rounding leaves in a logit.

    Args:
        rollout: The rollout, with the log-probabilities of its sampling.
        rows: Rows of the micro-batch.
        logps: The policy's log-probabilities of these rows (rows, width).
        step: Number of the step, from 1.
        dtype: Precision of the forward passes, which sets the tolerance.

    Raises:
        AssertionError: It is another: dropout is on, or sampling and updates compute differently.
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
