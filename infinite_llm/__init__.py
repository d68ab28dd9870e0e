"""Long-context LLM serving: one KV cache over many serving instances."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from infinite_llm.config import EngineConfig
  from infinite_llm.engine.llm import LLM
  from infinite_llm.engine.outputs import RequestOutput
  from infinite_llm.sampling_params import SamplingParams

__all__ = ["LLM", "EngineConfig", "RequestOutput", "SamplingParams"]

_HOMES = {
  "LLM": "infinite_llm.engine.llm",
  "EngineConfig": "infinite_llm.config",
  "RequestOutput": "infinite_llm.engine.outputs",
  "SamplingParams": "infinite_llm.sampling_params",
}


def __getattr__(name: str) -> Any:
  # Imported on first use: the control plane below this package must stay free
  # of JAX.
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(_HOMES[name]), name)
