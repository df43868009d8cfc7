"""The methods of the arena: each has the reward model that it needs."""

from spavl_lib.arena.methods import config_of, find_method, reward_config, reward_folder


def test_methods_share_a_reward_model_unless_they_need_another() -> None:
    shared = reward_folder(find_method("ppo"), 3, "demo")
    assert shared == reward_folder(find_method("rloo"), 3, "demo")
    assert shared.parts[-3:] == ("arena-reward-3", "reward", "model")
    method = find_method("ppo_lagrangian")
    own = reward_folder(method, 3, "demo")
    assert own.parts[-3] == "arena-reward-ppo_lagrangian-3"
    config = config_of(method, -5.0, 3, "demo")
    assert config.ppo.reward_model == str(own) and config.ppo.cost_limit == -5.0
    assert reward_config(method, 3, "demo").reward.cost_coef > 0
    assert not reward_config(find_method("ppo"), 3, "demo").reward.cost_coef


def test_profiles_do_not_share_runs() -> None:
    """A complete run of another profile would stand for a training that never took place."""
    method = find_method("dpo")
    names = {config_of(method, 1e-4, 0, profile).run_name for profile in ("demo", "smoke")}
    assert names == {"arena-dpo-0.0001-0", "arena-smoke-dpo-0.0001-0"}
    folders = {reward_folder(method, 0, profile) for profile in ("demo", "smoke")}
    assert len(folders) == 2
