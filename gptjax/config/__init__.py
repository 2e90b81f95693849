"""Settings of a run, as frozen dataclasses that are checked when they are made. Imports no jax.

Each fact has one owner: the vocabulary is `tokenizer.vocab_size`, the context `data.length`, and the model takes both
from there. Derived values are properties, never fields. What one verb alone needs is in checks, scaling, serving and
sweep.
"""

from gptjax.config.data import DataConfig, PrepareConfig, ShowConfig
from gptjax.config.generation import ChatConfig, ContinueConfig, GenerateConfig, InspectConfig
from gptjax.config.model import ModelConfig, VisionConfig
from gptjax.config.tokenizer import TokenizerConfig, TrainTokenizerConfig
from gptjax.config.training import (
    CHANGEABLE,
    SCHEMA,
    CheckpointConfig,
    EvalConfig,
    EvaluateConfig,
    ImportConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    check_divisible,
    defining_settings,
    frozen_changes,
    frozen_settings,
)
from gptjax.config.tuning import (
    STAGES,
    DpoConfig,
    GrpoConfig,
    LoraConfig,
    PolicyConfig,
    PpoConfig,
    RewardConfig,
    RewardsConfig,
    RolloutConfig,
    SftConfig,
    TuneConfig,
    ValueConfig,
)

__all__ = [
    "CHANGEABLE", "SCHEMA", "STAGES", "ChatConfig", "CheckpointConfig", "ContinueConfig", "DataConfig", "DpoConfig",
    "EvalConfig", "EvaluateConfig", "GenerateConfig", "GrpoConfig", "ImportConfig", "InspectConfig", "LoraConfig",
    "MeshConfig", "ModelConfig", "OptimConfig", "PolicyConfig", "PpoConfig", "PrepareConfig", "RewardConfig",
    "RewardsConfig", "RolloutConfig", "SftConfig", "ShowConfig", "TokenizerConfig", "TrainConfig",
    "TrainTokenizerConfig", "TuneConfig", "ValueConfig", "VisionConfig", "check_divisible", "defining_settings",
    "frozen_changes", "frozen_settings",
]  # fmt: skip
