"""The methods of the arena: each has valid settings and the reward model that it needs."""

import pytest

from spavl_lib.arena.methods import config_of, find_method, methods, reward_config, reward_folder


@pytest.mark.parametrize("name", methods())
def test_every_method_has_valid_settings(name: str) -> None:
    assert config_of(find_method(name), 3, "demo").run_name == f"arena-{name}-3"


def test_methods_share_a_reward_model_unless_they_need_another() -> None:
    shared = reward_folder(find_method("ppo"), 3, "demo")
    assert shared == reward_folder(find_method("rloo"), 3, "demo")
    assert shared.parts[-3:] == ("arena-reward-3", "reward", "model")
    method = find_method("ppo_lagrangian")
    own = reward_folder(method, 3, "demo")
    assert own.parts[-3] == "arena-reward-ppo_lagrangian-3"
    config = config_of(method, 3, "demo")
    assert config.ppo.reward_model == str(own) and config.ppo.cost_limit is not None
    assert reward_config(method, 3, "demo").reward.cost_coef > 0
    assert not reward_config(find_method("ppo"), 3, "demo").reward.cost_coef
