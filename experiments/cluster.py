"""The devices of an experiment: those of this process, or of its group."""

import os

import jax

from infinite_llm import LLM
from infinite_llm.config import EngineConfig
from infinite_llm.distributed.platforms import check_platform, choose_platform
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

  Raises:
    ConfigError: If JAX does not run on that platform.
  """
  group = current_group()
  if group is None:
    choose_platform(platform)
    if platform == "cpu":
      jax.config.update(
        "jax_num_cpu_devices", config.num_instances * config.tensor_parallel
      )
    check_platform(platform)
  return LLM(checkpoint, config, show_progress=show_progress, group=group)
