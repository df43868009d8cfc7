"""The Lagrange multiplier, and the score of reward and cost, by hand."""

import math

import pytest
import torch

from spavl_lib.objectives.lagrangian import LagrangeMultiplier, lagrangian_scores

REWARDS, COSTS = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])


@pytest.mark.parametrize("value", [0.01, 1.0, 3.0])
def test_scores_weigh_reward_and_cost(value: float) -> None:
    scores = lagrangian_scores(REWARDS, COSTS, log_multiplier=math.log(value))
    torch.testing.assert_close(scores, (REWARDS - value * COSTS) / (1 + value))


def test_a_multiplier_of_one_and_of_three_by_hand() -> None:
    one = LagrangeMultiplier(1.0, limit=0.0, learning_rate=0.1)
    assert one.scores(REWARDS, COSTS).tolist() == pytest.approx([0.75, -2.0])
    three = LagrangeMultiplier(3.0, limit=0.0, learning_rate=0.1)
    assert three.scores(REWARDS, COSTS).tolist() == pytest.approx([0.125, -2.5])


@pytest.mark.parametrize("log_multiplier", [-2000.0, 2000.0])
def test_extreme_multipliers_leave_reward_or_cost_alone(log_multiplier: float) -> None:
    scores = lagrangian_scores(REWARDS, COSTS, log_multiplier=log_multiplier)
    assert scores.tolist() == (REWARDS if log_multiplier < 0 else -COSTS).tolist()


def test_the_multiplier_rises_above_the_limit_and_falls_below() -> None:
    multiplier = LagrangeMultiplier(2.0, limit=-1.0, learning_rate=0.5)
    assert multiplier.value == pytest.approx(2.0)
    multiplier.update(3.0)  # 4 above the limit
    assert multiplier.value == pytest.approx(2 * math.exp(2.0))
    multiplier.update(-1.0)  # at the limit
    assert multiplier.value == pytest.approx(2 * math.exp(2.0))
    multiplier.update(-7.0)  # 6 below
    assert multiplier.value == pytest.approx(2 * math.exp(-1.0))
    other = LagrangeMultiplier(1.0, limit=-1.0, learning_rate=0.5)
    other.load_state_dict(multiplier.state_dict())
    assert other.value == multiplier.value
    multiplier.update(1e6)
    assert multiplier.value == math.inf
    assert multiplier.scores(REWARDS, COSTS).tolist() == (-COSTS).tolist()
