"""The devices of an experiment: those of this process, or of its group."""

import os

import jax

from infinite_llm import LLM
from infinite_llm.config import EngineConfig
from infinite_llm.distributed.runtime import current_group


def build_llm(
  checkpoint: str | os.PathLike[str],
  config: EngineConfig,
  platform: str,
  *,
  show_progress: bool,
) -> LLM:
  """Builds an `LLM` on all instances, wherever they are.

  Args:
    checkpoint: Its folder; in a group, one that all processes can read.
    config: Sizes and rules of the whole group.
    platform: "cpu" makes a device of the processor for each tensor rank of each
      instance; "gpu" takes the GPUs that are there.
    show_progress: Show bars.
  """
  group = current_group()
  if group is None and platform == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update(
      "jax_num_cpu_devices", config.num_instances * config.tensor_parallel
    )
  return LLM(checkpoint, config, show_progress=show_progress, group=group)
