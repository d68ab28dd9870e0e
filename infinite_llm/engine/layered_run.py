"""One row that attends HOST, on its way through the layers of an instance."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from infinite_llm.cache.packed_rows import PackedRows
from infinite_llm.cache.slab_store import HeldSlab, SlabStore
from infinite_llm.engine.layered_programs import LayeredPrograms
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import StepOutput
from infinite_llm.engine.step_batch import StepBatch
from pallas_kernels.attention_state import AttentionState
from pallas_kernels.micro_attention.api import BlockTables


class Part(NamedTuple):
  """What one instance brings to a layer.

  Attributes:
    x: `[T, dim]` tokens; of an instance without rows, anything.
    batch: Its row.
    tables: What that reads in HBM.
  """

  x: jax.Array
  batch: PackedRows[StepBatch]
  tables: PackedRows[BlockTables]


class Attended(NamedTuple):
  """What a row attended of a layer so far.

  Attributes:
    q: `[T, H, D]` its queries.
    state: Over `[T, H, D]`.
    covered: `[1]` uint32 coverage of what was read.
  """

  q: jax.Array
  state: AttentionState
  covered: jax.Array


class LayeredRun:
  """Launches the programs of one row; every layer in turn, in order.

  Attributes:
    part: What it brings to its next layer.
  """

  def __init__(
    self,
    runner: ModelRunner,
    own: int,
    programs: LayeredPrograms,
    layers: Sequence[jax.Array],
    batch: PackedRows[StepBatch],
    tables: PackedRows[BlockTables],
    slabs: Sequence[HeldSlab],
    store: SlabStore,
    meanwhile: Callable[[], None],
  ):
    """Embeds its tokens, and begins to bring the first slabs.

    Args:
      runner: The pools.
      own: Which of the runner's instances.
      programs: For the instance's row of the mesh, and T of the batch.
      layers: Number of each layer, on the instance's devices.
      batch: The row.
      tables: What it reads in HBM.
      slabs: What it reads in HOST.
      store: Has them.
      meanwhile: Called between slabs, which may take minutes.
    """
    self._meanwhile = meanwhile
    self._runner = runner
    self._own = own
    self._programs = programs
    self._layers = layers
    self._slabs = slabs
    self._store = store
    self._weights, self._kv_scales = runner.row_params[own]
    pool, x, self._proved = self._run(
      "begin", self._weights, runner.pool.row(own), batch
    )
    runner.pool.set_row(own, pool)
    self.part = Part(x, batch, tables)
    self._stream = store.stream(slabs, programs.slabs_together)

  def front(self, index: int) -> Attended:
    """Attends what is in HBM at home.

    Args:
      index: Of the layer.
    """
    pool, *attended = self._run(
      "front",
      self._weights["layers"][index],
      self.part.x,
      self._runner.pool.row(self._own),
      *self._read(index),
      self.part.tables,
    )
    self._runner.pool.set_row(self._own, pool)
    return Attended(*attended)

  def end_layer(self, index: int, attended: Attended) -> None:
    """Attends the slabs, and ends a layer; blocks the host while they come.

    Args:
      index: Of the layer.
      attended: What the row attended of it in HBM.
    """
    q, state, covered = attended
    read = self._read(index)
    together = self._programs.slabs_together
    for slabs in itertools.batched(self._slabs, together):
      staged = self._store.staged(slabs, self._stream.take(), together)
      state, covered = self._run("add", state, covered, q, *read, staged)
      del staged  # Its room is that of what comes next.
      self._stream.used(covered)
      self._meanwhile()
    x, self._proved = self._run(
      "back",
      self._weights["layers"][index],
      self.part.x,
      self.part.batch,
      *(state, covered, self._proved),
    )
    self.part = self.part._replace(x=x)

  def end(self) -> StepOutput:
    """Gives its logits, still being computed."""
    return self._run(
      "end", self._weights, self.part.x, self.part.batch, self._proved
    )

  def _read(self, index: int) -> tuple[Any, ...]:
    return self._layers[index], self._kv_scales, self.part.batch

  def _run(self, name: str, *args: Any) -> Any:
    instance = self._runner.instances[self._own]
    return self._runner.programs.run(
      (f"layered {name}", instance, self._programs.num_tokens),
      getattr(self._programs, name),
      args,
    )
