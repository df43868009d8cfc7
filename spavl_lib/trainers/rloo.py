"""Train a policy by RLOO, with trl's `RLOOTrainer`.

    spavl train rloo --profile demo

RLOO has the same objective as PPO, but no value model: each response's reward is compared with the
mean reward of the other responses to its prompt. `group.py` has what it shares with GRPO.
"""

from typing import Any

from trl import RLOOConfig as TRLConfig
from trl import RLOOTrainer
from trl.trainer import rloo_trainer

from spavl_lib.config import Config, RLOOConfig
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers.group import GroupMethod, GroupMixin, train_group
from spavl_lib.trainers.inputs import policy_inputs


class CheckedRLOOTrainer(GroupMixin, RLOOTrainer):
    """trl's trainer with this package's prompts, checkpoints and checks."""


def _arguments(rloo: RLOOConfig, common: dict[str, Any]) -> TRLConfig:
    return TRLConfig(**common, normalize_advantages=rloo.normalize_advantages)


RLOO = GroupMethod(CheckedRLOOTrainer, _arguments, rloo_trainer)


@stage_maker("rloo", inputs=policy_inputs, polls_stop=True)
def train_rloo(config: Config, stage: Stage, flag: StopFlag, *, live: Any = None) -> dict:
    """Train by RLOO, and save the policy.

    Args:
        config: Uses `data`, `model`, `rloo` and `seed`, and `evaluation` if a judge is a reward.
        stage: See `train_reward`.
        flag: See `train_reward`.
        live: See `train_reward`.

    Returns:
        The stage's summary. It names no best step, because no held-out rows are measured.

    Raises:
        SpavlError: For the reasons that `train_ppo` lists.
    """
    return train_group(RLOO, config, stage, flag, live)
