"""How many rBlocks fit beside the weights and the temporaries of the steps."""

import dataclasses

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from infinite_llm.cache.device_memory import DeviceMemory, device_memory
from infinite_llm.cache.host_pool import STAGING_BLOCKS
from infinite_llm.cache.slab_store import MOST_STAGED
from infinite_llm.config import EngineConfig
from infinite_llm.engine.group_inputs import empty_slots
from infinite_llm.engine.layered_programs import SLABS_TOGETHER
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.sampler import Sampler
from infinite_llm.errors import ConfigError
from infinite_llm.models.loaded_model import LoadedModel

UNMEASURED_NUM_BLOCKS = 1024
"""Size of a pool on devices that do not tell how much memory they have."""

_PROBE_NUM_BLOCKS = 8
"""Pool of the programs that are compiled to be measured: their temporaries do
not depend on it."""

_ENTRY_BYTES = 128
"""Beside its KV an rBlock has a tag, an epoch and room for two and a half table
entries, 28 bytes; the sums over all entries that prove coverage are temporaries
that grow with the pool, a few times 10 bytes for each rBlock."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
  """What one device of an instance needs beside the weights.

  Attributes:
    temporary_bytes: For steps, the sampler's state included.
    block_bytes: For an rBlock, and for what is kept of it in tables.
  """

  temporary_bytes: int
  block_bytes: int


def with_pool_size(
  model: LoadedModel, config: EngineConfig, *, attention: str | None = None
) -> EngineConfig:
  """Finds the size of the pools, if the configuration leaves it open.

  Compiles the largest programs to measure them, where devices report memory.
  *Blocks the host.*

  Args:
    model: Parameters on their mesh; nothing else of size is on the devices yet.
    config: Sizes of everything else.
    attention: Name of the micro-attention; None picks.

  Returns:
    The configuration with `num_blocks`.

  Raises:
    ConfigError: If not even the smallest pool fits.
  """
  if config.cache.num_blocks is not None:
    return config.with_num_blocks(config.cache.num_blocks)
  memories = device_memory(model.mesh.local_devices)
  if memories is None:
    logging.info(
      "The devices report no memory: each instance gets %d rBlocks. Set"
      " num_blocks for others.",
      UNMEASURED_NUM_BLOCKS,
    )
    return config.with_num_blocks(UNMEASURED_NUM_BLOCKS)
  needs = measure(model, config, attention=attention)
  num_blocks = min(
    blocks_that_fit(memory, needs, fraction=config.cache.memory_fraction)
    for memory in memories
  )
  if jax.process_count() > 1:
    fits = multihost_utils.process_allgather(np.int32(num_blocks))
    num_blocks = int(fits.min())
  logging.info(
    "Each instance gets %d rBlocks of %d bytes a device; steps need %d bytes.",
    num_blocks,
    needs.block_bytes,
    needs.temporary_bytes,
  )
  return config.with_num_blocks(num_blocks)


def blocks_that_fit(
  memory: DeviceMemory, needs: Needs, *, fraction: float
) -> int:
  """Divides what is free on a device.

  Args:
    memory: Its memory, with the weights in it.
    needs: What it is to hold beside.
    fraction: Part of the limit to use. The rest is a margin for what nobody
      counts: workspaces of libraries, buffers of collectives, fragmentation.

  Returns:
    rBlocks, the null block included.

  Raises:
    ConfigError: If there are fewer than two.
  """
  usable_bytes = int(memory.limit_bytes * fraction)
  free_bytes = usable_bytes - memory.in_use_bytes - needs.temporary_bytes
  num_blocks = free_bytes // needs.block_bytes
  if num_blocks < 2:
    raise ConfigError(
      f"num_blocks must be at least 2, but {max(num_blocks, 0)} fit: of"
      f" {memory.limit_bytes} bytes memory_fraction = {fraction} allows"
      f" {usable_bytes}; weights take {memory.in_use_bytes}, temporaries of"
      f" the steps {needs.temporary_bytes}, which leaves {free_bytes} for"
      f" rBlocks of {needs.block_bytes}. Use more devices (tensor_parallel) or"
      " smaller prefill_buckets."
    )
  return num_blocks


def measure(
  model: LoadedModel, config: EngineConfig, *, attention: str | None = None
) -> Needs:
  """Compiles the largest programs against a tiny pool and adds their needs up.

  Programs of a device run one after the other, so the largest temporaries
  count once. Their outputs, logits above all, count all together: every program
  of a step may hold its own until the step is committed.

  Args:
    model: Parameters on their mesh.
    config: Buckets of the programs.
    attention: Name of the micro-attention; None picks.

  Returns:
    What one device needs.
  """
  config = config.with_num_blocks(_PROBE_NUM_BLOCKS)
  runner = ModelRunner(model, config, attention=attention)
  own = runner.instances
  sampler = Sampler(
    own[0],
    runner.row_meshes[0],
    runner.programs,
    vocab_size=model.config.vocab_size,
    max_num_seqs=config.scheduler.max_num_seqs,
    max_logprobs=config.max_logprobs,
  )
  outputs = [
    runner.local_step(own[0], [], is_prefill=is_prefill, bucket=buckets[-1])
    for is_prefill, buckets in (
      (False, config.scheduler.decode_buckets),
      (True, config.scheduler.prefill_buckets),
    )
  ]
  if config.has_group:
    nobody = [[] for _ in own]
    slots = [
      empty_slots(config.num_instances, config.lending.spill_slots)
      for _ in nobody
    ]
    chunk_tokens = config.lending.group_prefill_buckets[-1]
    if config.cache.host_attention:  # Larger than any, and attends as one does.
      chunk_tokens = max(chunk_tokens, config.scheduler.chunk_tokens)
    for is_prefill, bucket in ((False, None), (True, chunk_tokens)):
      group = runner.group_step(
        nobody, slots, is_prefill=is_prefill, bucket=bucket
      )
      outputs.append(group[0])
  for output in outputs:
    sampler.warm_up(output)
  needs = [program.memory_analysis() for program in runner.programs.compiled()]
  temporary_bytes = max(need.temp_size_in_bytes for need in needs)
  output_bytes = sum(
    need.output_size_in_bytes - need.alias_size_in_bytes for need in needs
  )
  # Nothing of the probe may be left when the real pools are placed.
  jax.block_until_ready((runner.pool.group(), outputs))
  block_bytes = runner.pool.block_bytes // config.tensor_parallel
  if config.cache.host_blocks:
    temporary_bytes += STAGING_BLOCKS * block_bytes
  if config.cache.host_attention:
    # A slab that leaves, and one layer each of those that are staged.
    parts = MOST_STAGED * SLABS_TOGETHER
    num_slabs = 2 + -(-parts // model.config.num_layers)
    slab_blocks = 1 + config.cache.max_slab_blocks
    temporary_bytes += num_slabs * slab_blocks * block_bytes
  return Needs(
    temporary_bytes=temporary_bytes + output_bytes + sampler.state_bytes,
    block_bytes=block_bytes + _ENTRY_BYTES,
  )
