"""Decode steps of full batches, beside which rBlocks move in benches."""

import statistics
import time
from collections.abc import Callable

import ml_collections
import numpy as np

from experiments.model_shape import model_shape
from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.block_table import BlockTable
from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import StepOutput
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.models.dummy_weights import draw_model


def nothing() -> None:
  """What is done between steps, if nothing is."""


class DecodeSteps:
  """Instances of a random model, each with a full batch that decodes.

  Attributes:
    config: Of the engine that would run them.
    runner: The devices.
    free_blocks: rBlocks of each instance that no row has, for moves.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    num_instances: int,
    more_blocks: int,
  ):
    """Draws the model and places the pools.

    Args:
      config: See `configs/data_plane_bench.py`.
      num_instances: Each on one device.
      more_blocks: rBlocks of a pool beside those of the batch.
    """
    step, block_size = config.step, config.model.block_size
    row_blocks = -(-step.context // block_size)
    self.config: EngineConfig = engine_config(
      num_instances=num_instances,
      block_size=block_size,
      num_blocks=1 + step.rows * row_blocks + more_blocks,
      dtype=config.model.dtype,
      max_num_seqs=step.rows,
      decode_buckets=(step.rows,),
      headroom_blocks=0,
    )
    model = draw_model(
      model_shape(config.model),
      make_mesh(num_instances, 1),
      seed=config.seed,
      dtype=config.model.dtype,
    )
    self.runner = ModelRunner(model, self.config)
    self._rows = []
    for instance in self.runner.instances:
      pool = BlockPool(instance, self.config.cache.num_blocks)
      rows = []
      for uid in range(1, step.rows + 1):
        table = BlockTable(uid, instance, block_size)
        table.append(pool.allocate(row_blocks, uid) or ())
        rows.append(RowInput((uid,), step.context - 1, table))
      self._rows.append(rows)
    first = 1 + step.rows * row_blocks
    self.free_blocks = range(first, first + more_blocks)

  def times_s(
    self, count: int, between: Callable[[], None] = nothing
  ) -> list[float]:
    """Runs steps, all instances at once, each launched behind the one before.

    In a group of processes each runs its own instances.

    Args:
      count: How many.
      between: Called before each step is launched.

    Returns:
      Seconds from the end of a step to that of the next one.
    """
    times: list[float] = []
    before: list[StepOutput] = []
    ended = time.perf_counter()
    for _ in range(count + 1):
      between()
      outputs = [
        self.runner.local_step(instance, rows, is_prefill=False)
        for instance, rows in zip(
          self.runner.instances, self._rows, strict=True
        )
      ]
      for output in before:
        np.asarray(output.proved)  # As an engine fetches tokens.
      if before:
        times.append(time.perf_counter() - ended)
      ended, before = time.perf_counter(), outputs
    for output in before:
      np.asarray(output.proved)
    return times

  def median_s(
    self, count: int, between: Callable[[], None] = nothing
  ) -> float:
    """Median of `times_s`, the first ones left out."""
    warm = max(count // 5, 1)
    return statistics.median(self.times_s(count + warm, between)[warm:])
