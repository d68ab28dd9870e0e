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
  """

  row: int
  request: Request


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

  Which tokens a request has seen, for repetition penalties, is state on the
  device: a row per running request that asks for it. It takes a new token in
  the program that chose it, and only if the row was proved.
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
      max_num_seqs: Most requests with repetition penalties at once.
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
    self._free_rows = list(range(max_num_seqs))
    self._row_of: dict[RequestUid, int] = {}

  @property
  def state_bytes(self) -> int:
    """Bytes of the state on every device of the instance."""
    return self._seen.nbytes

  def sample(
    self, output: StepOutput, rows: Sequence[SampleRow]
  ) -> PendingSample:
    """Launches the choice of the next tokens of a step.

    Args:
      output: What the step gave; `[B]` rows.
      rows: Rows to sample; the others' tokens mean nothing.

    Returns:
      Tokens of all `B` rows, already on their way to the host.
    """
    bucket = output.logits.shape[0]
    kind = SamplingKind.for_rows(row.request.sampling for row in rows)
    given: list[tuple[SamplingParams, int, int]]
    given = [(SamplingParams(), 0, 0)] * bucket
    seen_rows = np.full(bucket, len(self._seen), np.int32)
    for b, request in rows:
      sampling = request.sampling
      given[b] = (sampling, sampling.seed or 0, request.num_tokens)
      if sampling.repetition_penalty != 1:
        seen_rows[b] = self._seen_row(request)
    arrays = sampling_arrays(given, bucket)
    pending = self._launch(kind, output, arrays, seen_rows)
    # Behind the step on the devices, rather than when the host finds it over.
    for leaf in jax.tree.leaves(pending):
      leaf.copy_to_host_async()
    return pending

  def _launch(
    self,
    kind: SamplingKind,
    output: StepOutput,
    arrays: SamplingArrays,
    seen_rows: np.ndarray,
  ) -> PendingSample:
    given = place_rows([(arrays, seen_rows)], self._row_mesh, [self._row_mesh])
    sampled, self._seen = self._programs.run(
      (kind.value, self._instance, len(seen_rows)),
      lambda: build_sample(kind, self._max_logprobs),
      (*output, given, self._seen),
    )
    return PendingSample(sampled, output.proved)

  def forget(self, uid: RequestUid) -> None:
    """Drops the state of a request that stopped running, if it has any."""
    row = self._row_of.pop(uid, None)
    if row is not None:
      self._free_rows.append(row)

  def warm_up(self, output: StepOutput) -> None:
    """Compiles all kinds of sampling a step of this shape."""
    bucket = output.logits.shape[0]
    nobody = np.full(bucket, len(self._seen), np.int32)
    for kind in SamplingKind:
      self._launch(kind, output, sampling_arrays([], bucket), nobody)
    self._mark(0, np.zeros(self._seen.shape[1], bool))

  def _seen_row(self, request: Request) -> int:
    """The request's row of the state; a new one has its tokens so far."""
    if request.uid not in self._row_of:
      self._row_of[request.uid] = self._free_rows.pop()
      seen = np.zeros(self._seen.shape[1], bool)
      seen[np.asarray(request.token_ids)] = True
      self._mark(self._row_of[request.uid], seen)
    return self._row_of[request.uid]

  def _mark(self, row: int, seen: np.ndarray) -> None:
    """Overwrites a row of the state."""
    placed = jax.device_put((np.int32(row), seen), self._replicated)
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


def _mark_seen(seen: jax.Array, row: jax.Array, tokens: jax.Array) -> jax.Array:
  return seen.at[row].set(tokens)


def build_sample(
  kind: SamplingKind, max_logprobs: int
) -> Callable[..., tuple[Sampled, jax.Array]]:
  """Builds a sampling program: of one instance alone, without a conditional.

  Args:
    kind: What the rows of its steps may ask for.
    max_logprobs: Most likely tokens reported with each token.

  Returns:
    Jitted `(logits [B, V], proved [B], given, seen) -> (sampled, seen)`, where
    `given` are the `SamplingArrays` of the rows and `[B]` their rows of `seen`.
    Donates `seen`.
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
  ) -> tuple[Sampled, jax.Array]:
    arrays, seen_rows = given.own()
    # Rows without a penalty point past the state: they read no token as seen,
    # and what they would write is dropped.
    mine = seen.at[seen_rows].get(mode="fill", fill_value=False)
    sampled = choose(logits, arrays, mine)
    target = jnp.where(proved, seen_rows, seen.shape[0])
    return sampled, seen.at[target, sampled.token].set(True, mode="drop")

  return jax.jit(run, donate_argnums=(3,))
