"""The records that a PPO run writes: log rows, rollouts.jsonl, summary figures, model card."""

from spavl_lib.config import Config
from spavl_lib.objectives.lagrangian import LagrangeMultiplier
from spavl_lib.objectives.ppo import explained_variance, kl_estimate, masked_mean
from spavl_lib.trainers.export_card import model_card, policy_results
from spavl_lib.trainers.progress import first_and_last_tenth
from spavl_lib.trainers.rollout import Rollout


def rollout_stats(
    rollout: Rollout, kl_coef: float, multiplier: LagrangeMultiplier | None = None
) -> dict[str, float]:
    """Compute the values to log for a rollout, before any update.

    Args:
        rollout: A rollout with scores, rewards, values and returns.
        kl_coef: The KL coefficient with which the rewards were computed.
        multiplier: The Lagrange multiplier with which the rewards were computed; None without a
            cost limit.

    Returns:
        Name -> value. Values under `objective/` and `response/` are means over responses, with
        three exceptions: `scores_std` is the standard deviation of the scores, `entropy` is a mean
        over tokens, and `kl_coef` is the argument. KL and entropy are in nats, lengths in tokens.
        With a multiplier, `costs` is the mean cost; `cost_limit` and `lagrange_multiplier` are the
        multiplier's.
    """
    columns, mask = rollout.columns, rollout.mask
    scores, lengths = columns["scores"], mask.sum(1).float()
    kl = (kl_estimate(columns["logps"], columns["ref_logps"], kind="k1") * mask).sum(1)
    costs = {} if multiplier is None else {
        "objective/costs": columns["costs"].mean().item(),
        "objective/cost_limit": multiplier.limit,
        "objective/lagrange_multiplier": multiplier.value,
    }  # fmt: skip
    return {
        "objective/scores": scores.mean().item(),
        "objective/scores_std": scores.std(unbiased=False).item(),
        "objective/rlhf_reward": columns["rewards"].sum(1).mean().item(),
        "objective/kl": kl.mean().item(),
        "objective/entropy": masked_mean(columns["entropy"], mask).item(),
        "objective/kl_coef": kl_coef,
        **costs,
        "response/length": lengths.mean().item(),
        "response/finished": sum(rollout.finished) / len(rollout),
        "response/empty": sum(not text for text in rollout.texts) / len(rollout),
        "val/mean": masked_mean(columns["values"], mask).item(),
        "val/advantage": rollout.mean_advantage,
        "val/explained_variance": explained_variance(columns["values"], columns["returns"], mask),
    }


def rollout_records(rollout: Rollout, step: int) -> list[dict]:
    """Build rows of rollouts.jsonl: each response with its score and its KL to the reference.

    The KL is in nats. With a cost limit, each row has a cost too.
    """
    columns = rollout.columns
    kl = (columns["logps"] - columns["ref_logps"]).sum(1).tolist()
    return [
        {
            "step": step,
            "id": prompt.row_id,
            "prompt": prompt.text,
            "response": rollout.texts[i],
            "reward": round(columns["scores"][i].item(), 6),
            **({"cost": round(columns["costs"][i].item(), 6)} if "costs" in columns else {}),
            "kl": round(kl[i], 6),
            "num_tokens": len(rollout.responses[i]),
            "finished": rollout.finished[i],
        }
        for i, prompt in enumerate(rollout.prompts)
    ]


def summary_figures(log_rows: list[dict]) -> dict[str, dict]:
    """Summarise scores, costs and KL of a finished run, from the run's rows of metrics.jsonl."""
    kl = first_and_last_tenth(log_rows, "objective/kl")
    costs = first_and_last_tenth(log_rows, "objective/costs")
    return {
        **({"costs": costs} if costs["last_steps"] is not None else {}),
        "scores": first_and_last_tenth(log_rows, "objective/scores"),
        "kl": {
            "last_steps": kl["last_steps"],
            "highest": max(row["objective/kl"] for row in log_rows),
        },
    }


def card(config: Config, summary: dict) -> str:
    """Write the model card of a finished run."""
    settings = config.ppo
    return model_card(
        config, "ppo", tags=("rlhf",), source="prompts of ", table="result",
        facts=[
            f"{summary['rollouts']} responses in {summary['steps']} rollouts",
            f"{summary['optimizer_steps']} optimizer steps",
            f"peak rate {settings.learning_rate}",
            f"kl_coef {settings.kl_coef} ({settings.kl_estimator})",
        ],
        results=policy_results("score", summary["scores"], summary["kl"]["last_steps"], "response"),
    )  # fmt: skip
