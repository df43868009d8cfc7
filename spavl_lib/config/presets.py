"""The method constants in the scripts of the SPA-VL authors' code, without settings of scale."""

from typing import Any

# Section -> settings that `preset: original` sets.
ORIGINAL_PRESET: dict[str, dict[str, Any]] = {
    "reward": {
        "center_coef": 0.0, "sft_coef": 0.0, "cost_coef": 0.0, "shift_px": 0, "mirror": False,
        "original_form": True, "lr_scheduler": "constant_with_warmup", "warmup_steps": 0.03,
        "weight_decay": 0.0, "max_grad_norm": 1.0,
    },
    "dpo": {
        "beta": 0.1, "loss_type": ("sigmoid",), "loss_weights": (1.0,), "label_smoothing": 0.0,
        "lr_scheduler": "cosine", "warmup_steps": 10, "weight_decay": 0.0, "max_grad_norm": 1.0,
    },
    "ppo": {
        "ppo_epochs": 1, "num_minibatches": 1, "value_learning_rate": 0.0,
        "lr_scheduler": "cosine", "warmup_steps": 10, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "gamma": 1.0, "gae_lambda": 1.0, "clip_range": 0.2, "value_clip_range": 0.2,
        "vf_coef": 0.1, "kl_coef": 0.1, "kl_estimator": "k1", "kl_target": 0.0, "cost_limit": None,
        "whiten_advantages": False, "whiten_rewards": False, "temperature": 1.0,
        "missing_eos_penalty": 0.0, "length_penalty": 0.0, "entropy_coef": 0.0, "sft_coef": 0.0,
    },
}  # fmt: skip
# Section -> `model.adapter` -> learning rate that `preset: original` sets. An adapter that is not
# named gets the rate of `full`.
ORIGINAL_LEARNING_RATE = {
    "reward": {"full": 3e-5, "lora": 3e-5, "qlora": 3e-5},
    "dpo": {"full": 1e-6, "lora": 2e-5, "qlora": 2e-5},
    "ppo": {"full": 5e-7, "lora": 1e-6, "qlora": 1e-6},
}


def original_preset(section: str, adapter: str) -> dict[str, Any]:
    """Settings that `preset: original` sets in a section, with the learning rate of an adapter.

    Args:
        section: Key of `ORIGINAL_PRESET`.
        adapter: `model.adapter`.
    """
    rates = ORIGINAL_LEARNING_RATE[section]
    return ORIGINAL_PRESET[section] | {"learning_rate": rates.get(adapter, rates["full"])}
