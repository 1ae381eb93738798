"""The configuration of a run: see :mod:`.schema` for the keys and :mod:`.load` for the files."""

from horovod_megdet.config.load import DEMO, as_config, load_config, merge, override
from horovod_megdet.config.schema import (
    BatchNormConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Norm,
    OutputConfig,
    RuntimeConfig,
    Section,
    SolverConfig,
    by_dotted_key,
    section_type,
)

__all__ = [
    "DEMO",
    "BatchNormConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "Norm",
    "OutputConfig",
    "RuntimeConfig",
    "Section",
    "SolverConfig",
    "as_config",
    "by_dotted_key",
    "load_config",
    "merge",
    "override",
    "section_type",
]
