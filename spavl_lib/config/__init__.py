"""The frozen config of a run: sections of settings, profiles, and the SPA-VL authors' presets."""

from spavl_lib.config.loading import (
    PROFILES,
    current_names,
    from_dict,
    load_config,
    profile_argument,
    profile_names,
)
from spavl_lib.config.sections import (
    LINEARS,
    ColumnsConfig,
    Config,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    GenerationConfig,
    GroupConfig,
    GRPOConfig,
    KTOConfig,
    LaunchConfig,
    ModelConfig,
    OnlineDPOConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    ScalingConfig,
)
from spavl_lib.config.validation import defaults, flatten, section, to_plain

__all__ = [
    "LINEARS", "PROFILES", "ColumnsConfig", "Config", "DPOConfig", "DataConfig", "EvaluationConfig",
    "GRPOConfig", "GenerationConfig", "GroupConfig", "KTOConfig", "LaunchConfig", "ModelConfig",
    "OnlineDPOConfig", "PPOConfig", "RLOOConfig", "RewardConfig", "ScalingConfig", "current_names",
    "defaults", "flatten", "from_dict", "load_config", "profile_argument", "profile_names",
    "section", "to_plain",
]  # fmt: skip
