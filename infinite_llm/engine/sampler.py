"""Samples the rows of a step where their logits are: on the instance itself."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.cache.packed_rows import PackedRows, place_rows
from infinite_llm.engine.program_cache import ProgramCache
from infinite_llm.engine.programs import StepOutput
from infinite_llm.engine.sampling import (
  Sampled,
  SamplingArrays,
  SamplingKind,
  sample,
  sampling_arrays,
)
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.request import Request
from infinite_llm.types import RequestUid


class SampleRow(NamedTuple):
  """One row of a step whose next token is wanted.

  Attributes:
    row: Its number in the step.
    request: Its request; its sampling has a seed.
    position: Of the token to be chosen.
  """

  row: int
  request: Request
  position: int


class PendingSample(NamedTuple):
  """Sampled rows, still being computed.

  Attributes:
    sampled: Tokens and log-probabilities of all rows.
    proved: `[B]` bool. A row that is not proved has no token.
  """

  sampled: Sampled
  proved: jax.Array


class Sampler:
  """Chooses next tokens for one instance.

  Each request that it samples has a slot of state on the device: its newest
  token, which a step may take before the host knows it, and, where there are
  repetition penalties, which tokens it has seen. Both take a new token in the
  program that chose it, the latter only if the row was proved.

  Attributes:
    newest: `[max_num_seqs]` int32 newest token of each slot, as of the last
      program that was launched.
  """

  def __init__(
    self,
    instance: int,
    row_mesh: Mesh,
    programs: ProgramCache,
    *,
    vocab_size: int,
    max_num_seqs: int,
    max_logprobs: int,
  ):
    """Allocates the state.

    Args:
      instance: Whose rows are sampled.
      row_mesh: The instance's own devices.
      programs: Where compiled programs are kept.
      vocab_size: V.
      max_num_seqs: Most requests that run at once.
      max_logprobs: Most likely tokens reported with each token.
    """
    self._instance = instance
    self._row_mesh = row_mesh
    self._programs = programs
    self._max_logprobs = max_logprobs
    self._replicated = NamedSharding(row_mesh, PartitionSpec())
    self._seen = jax.device_put(
      np.zeros((max_num_seqs, vocab_size), bool), self._replicated
    )
    self.newest = jax.device_put(
      np.zeros(max_num_seqs, np.int32), self._replicated
    )
    # What greedy steps of each number of rows took last, and of which slots.
    self._greedy: dict[
      int, tuple[PackedRows[tuple[SamplingArrays, np.ndarray]], np.ndarray]
    ] = {}
    self._free_slots = list(range(max_num_seqs))
    # By the time of their newest token.
    self._slot_of: dict[RequestUid, int] = {}

  @property
  def state_bytes(self) -> int:
    """Bytes of the state on every device of the instance."""
    return self._seen.nbytes + self.newest.nbytes

  def slot(self, uid: RequestUid) -> int:
    """Slot of a request whose newest token was sampled here."""
    return self._slot_of[uid]

  def sample(
    self, output: StepOutput, rows: Sequence[SampleRow]
  ) -> PendingSample:
    """Launches the choice of the next tokens of a step.

    Args:
      output: What the step gave; `[B]` rows.
      rows: Rows to sample, of requests that run; the others' tokens mean
        nothing.

    Returns:
      Tokens of all `B` rows, already on their way to the host.
    """
    bucket = output.logits.shape[0]
    kind = SamplingKind.for_rows(row.request.sampling for row in rows)
    given: list[tuple[SamplingParams, int, int]]
    given = [(SamplingParams(), 0, 0)] * bucket
    slots = self._no_slots(bucket)
    for b, request, position in rows:
      sampling = request.sampling
      given[b] = (sampling, sampling.seed or 0, position)
      slots[b] = self._take_slot(request)
    pending = self._launch(kind, output, given, slots)
    # Behind the step on the devices, rather than when the host finds it over.
    for leaf in jax.tree.leaves(pending):
      leaf.copy_to_host_async()
    return pending

  def _launch(
    self,
    kind: SamplingKind,
    output: StepOutput,
    rows: Sequence[tuple[SamplingParams, int, int]],
    slots: np.ndarray,
  ) -> PendingSample:
    given = self._place(kind, rows, slots)
    sampled, self._seen, self.newest = self._programs.run(
      (kind.value, self._instance, len(slots)),
      lambda: build_sample(kind, self._max_logprobs),
      (*output, given, self._seen, self.newest),
    )
    return PendingSample(sampled, output.proved)

  def forget(self, uid: RequestUid) -> None:
    """Drops the state of a request that stopped running, if it has any."""
    slot = self._slot_of.pop(uid, None)
    if slot is not None:
      self._free_slots.append(slot)

  def warm_up(self, output: StepOutput) -> None:
    """Compiles all kinds of sampling a step of this shape."""
    bucket = output.logits.shape[0]
    for kind in SamplingKind:
      self._launch(kind, output, [], self._no_slots(bucket))
    self._mark(0, np.zeros(self._seen.shape[1], bool))

  def _place(
    self,
    kind: SamplingKind,
    rows: Sequence[tuple[SamplingParams, int, int]],
    slots: np.ndarray,
  ) -> PackedRows[tuple[SamplingArrays, np.ndarray]]:
    """Puts how to choose on the devices, unless the same lies there.

    Greedy steps one after the other, as of a full batch, differ in nothing.
    """
    mesh, bucket = self._row_mesh, len(slots)
    is_greedy = kind is SamplingKind.GREEDY
    if is_greedy and bucket in self._greedy:
      placed, of = self._greedy[bucket]
      if np.array_equal(of, slots):
        return placed
    arrays = sampling_arrays([] if is_greedy else rows, bucket)
    placed = place_rows([(arrays, slots)], mesh, [mesh])
    if is_greedy:
      self._greedy[bucket] = placed, slots
    return placed

  def _no_slots(self, bucket: int) -> np.ndarray:
    return np.full(bucket, len(self._seen), np.int32)

  def _take_slot(self, request: Request) -> int:
    """The request's slot; a new one has seen its tokens so far.

    One that waits again keeps its own until another needs it. There are as many
    slots as requests may run: if all are taken, somebody has one who does not
    run, and who was sampled before all that are under way.
    """
    slot = self._slot_of.pop(request.uid, None)
    if slot is None:
      if not self._free_slots:
        self.forget(next(iter(self._slot_of)))
      slot = self._free_slots.pop()
      if request.sampling.repetition_penalty != 1:
        seen = np.zeros(self._seen.shape[1], bool)
        seen[np.asarray(request.token_ids)] = True
        self._mark(slot, seen)
    self._slot_of[request.uid] = slot
    return slot

  def _mark(self, slot: int, seen: np.ndarray) -> None:
    """Overwrites what a slot has seen."""
    placed = jax.device_put((np.int32(slot), seen), self._replicated)
    self._seen = self._programs.run(
      ("mark_seen", self._instance),
      lambda: jax.jit(_mark_seen, donate_argnums=(0,)),
      (self._seen, *placed),
    )


def fetch(pending: PendingSample) -> Mapping[str, np.ndarray]:
  """Waits for sampled rows. Blocks the host.

  Returns:
    Fields of `Sampled`, and `proved`, as numpy arrays over `[B]`.
  """
  sampled, proved = jax.device_get(pending)
  return {**sampled._asdict(), "proved": proved}


def _mark_seen(
  seen: jax.Array, slot: jax.Array, tokens: jax.Array
) -> jax.Array:
  return seen.at[slot].set(tokens)


def build_sample(
  kind: SamplingKind, max_logprobs: int
) -> Callable[..., tuple[Sampled, jax.Array, jax.Array]]:
  """Builds a sampling program: of one instance alone, without a conditional.

  Args:
    kind: What the rows of its steps may ask for.
    max_logprobs: Most likely tokens reported with each token.

  Returns:
    Jitted `(logits [B, V], proved [B], given, seen [S, V], newest [S]) ->
    (sampled, seen, newest)`, where `given` are the `SamplingArrays` of the rows
    and `[B]` their slots, S for none. Donates `seen` and `newest`.
  """
  choose = functools.partial(
    sample,
    max_logprobs=0 if kind is SamplingKind.GREEDY else max_logprobs,
    kind=kind,
  )

  def run(
    logits: jax.Array,
    proved: jax.Array,
    given: PackedRows[tuple[SamplingArrays, jax.Array]],
    seen: jax.Array,
    newest: jax.Array,
  ) -> tuple[Sampled, jax.Array, jax.Array]:
    arrays, slots = given.own()
    nowhere = seen.shape[0]
    # Rows without a penalty point past what was seen: they read no token as
    # seen, and what they would write is dropped.
    seen_at = jnp.where(arrays.repetition_penalty != 1, slots, nowhere)
    mine = seen.at[seen_at].get(mode="fill", fill_value=False)
    sampled = choose(logits, arrays, mine)
    target = jnp.where(proved, seen_at, nowhere)
    seen = seen.at[target, sampled.token].set(True, mode="drop")
    return sampled, seen, newest.at[slots].set(sampled.token, mode="drop")

  return jax.jit(run, donate_argnums=(3, 4))
