"""Long-context LLM serving: one KV cache over many serving instances."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from infinite_llm.config import (
    CacheConfig,
    EngineConfig,
    LendingConfig,
    SchedulerConfig,
    engine_config,
  )
  from infinite_llm.engine.calibration import calibrate_kv_scales
  from infinite_llm.engine.llm import LLM
  from infinite_llm.engine.outputs import RequestOutput
  from infinite_llm.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    CoverageError,
    InvariantError,
    ModelError,
    RequestError,
  )
  from infinite_llm.sampling_params import SamplingParams

_HOMES = {
  "LLM": "infinite_llm.engine.llm",
  "CacheConfig": "infinite_llm.config",
  "EngineConfig": "infinite_llm.config",
  "LendingConfig": "infinite_llm.config",
  "SchedulerConfig": "infinite_llm.config",
  "engine_config": "infinite_llm.config",
  "calibrate_kv_scales": "infinite_llm.engine.calibration",
  "RequestOutput": "infinite_llm.engine.outputs",
  "SamplingParams": "infinite_llm.sampling_params",
  "CapacityError": "infinite_llm.errors",
  "CheckpointError": "infinite_llm.errors",
  "ConfigError": "infinite_llm.errors",
  "CoverageError": "infinite_llm.errors",
  "InvariantError": "infinite_llm.errors",
  "ModelError": "infinite_llm.errors",
  "RequestError": "infinite_llm.errors",
}

__all__ = [
  "LLM",
  "CacheConfig",
  "CapacityError",
  "CheckpointError",
  "ConfigError",
  "CoverageError",
  "EngineConfig",
  "InvariantError",
  "LendingConfig",
  "ModelError",
  "RequestError",
  "RequestOutput",
  "SamplingParams",
  "SchedulerConfig",
  "calibrate_kv_scales",
  "engine_config",
]


def __getattr__(name: str) -> Any:
  # Imported on first use: the control plane below this package must stay free
  # of JAX.
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)
