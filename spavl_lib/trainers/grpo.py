"""Train a policy by GRPO (Shao et al. 2024), with trl's `GRPOTrainer`.

    spavl train grpo --profile demo

GRPO compares each response's reward with the mean and the standard deviation of its group, and adds
the KL penalty to the loss instead of the reward. `group.py` has what it shares with RLOO.
"""

from typing import Any

from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from spavl_lib.config import Config, GRPOConfig
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers.group import GroupMethod, GroupMixin, train_group
from spavl_lib.trainers.inputs import policy_inputs


class CheckedGRPOTrainer(GroupMixin, GRPOTrainer):
    """trl's trainer with this package's prompts, checkpoints and checks."""


def _arguments(grpo: GRPOConfig, common: dict[str, Any]) -> TRLConfig:
    return TRLConfig(**common, loss_type=grpo.loss_type, scale_rewards=grpo.scale_rewards)


GRPO = GroupMethod(CheckedGRPOTrainer, _arguments, grpo_trainer)


@stage_maker("grpo", inputs=policy_inputs, polls_stop=True)
def train_grpo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train by GRPO, and save the policy.

    Args:
        config: Uses `data`, `model`, `grpo` and `seed`, and `evaluation` if a judge is a reward.
        stage: See `train_reward`.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary. It names no best step, because no held-out rows are measured.

    Raises:
        SpavlError: For the reasons that `train_ppo` lists.
    """
    return train_group(GRPO, config, stage, flag, live)
