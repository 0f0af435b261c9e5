"""Experiments: typed settings, written in TOML or in Python, and the objects that they name."""

from jwins.experiment.experiment import (
    Experiment,
    digest_of,
    identity_settings,
    merge_experiment,
    result_settings,
)
from jwins.experiment.load import BUNDLED, bundled, load, read
from jwins.experiment.sections import (
    ComputeConfig,
    CrashConfig,
    DelayConfig,
    DropConfig,
    LinksConfig,
    NodesConfig,
    OptimizerConfig,
    RejoinConfig,
    RunConfig,
    StopConfig,
    TaskConfig,
    TrainConfig,
    WireConfig,
)

__all__ = [
    "BUNDLED",
    "ComputeConfig",
    "CrashConfig",
    "DelayConfig",
    "DropConfig",
    "Experiment",
    "LinksConfig",
    "NodesConfig",
    "OptimizerConfig",
    "RejoinConfig",
    "RunConfig",
    "StopConfig",
    "TaskConfig",
    "TrainConfig",
    "WireConfig",
    "bundled",
    "digest_of",
    "merge_experiment",
    "load",
    "read",
    "result_settings",
    "identity_settings",
]
