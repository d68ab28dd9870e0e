"""A small engine whose devices and messages tests can disturb."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from infinite_llm.attention.dist_attention import HostedRows
from infinite_llm.cache.rblock import Location
from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.group_inputs import hosted_rows
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.models.hf_loader import LoadedModel, load_hf
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.messages import GMANAGER, Address, Body, Envelope
from infinite_llm.scheduler.request import Request
from infinite_llm.types import InstanceId, Tier
from tests.recount import check_engine_books
from tests.testing import GOLDEN, GreedyOracle, lockstep
from tests.tolerances import tolerance

BLOCK_SIZE = 16
MAX_TOKENS = 256


class Ask(NamedTuple):
  """A request of a workload.

  Attributes:
    length: Tokens of its prompt.
    count: Tokens of its answer.
    instance: Its owner.
  """

  length: int
  count: int
  instance: int


# Two requests that need others' rBlocks, and two that do not.
LONG = "long"
WORKLOAD = {
  LONG: Ask(232, 10, 0),
  "other": Ask(172, 8, 1),
  "short-2": Ask(24, 12, 2),
  "short-3": Ask(20, 12, 3),
}


class Mail:
  """Interceptor of a transport; passes messages on until told otherwise.

  Attributes:
    rule: Turns a message that is sent into those that are to arrive.
    held: Messages that a rule keeps back for later.
    sent: How many messages of each kind were sent.
  """

  def __init__(self):
    self.rule: Callable[[Envelope], Iterable[Envelope]] = _pass
    self.held: list[Envelope] = []
    self.sent: collections.Counter[str] = collections.Counter()

  def __call__(self, envelope: Envelope) -> Iterable[Envelope]:
    self.sent[type(envelope.body).__name__] += 1
    return self.rule(envelope)

  def hold(self, envelope: Envelope) -> Iterable[Envelope]:
    """A rule: messages wait until `release`."""
    self.held.append(envelope)
    return ()

  def release(self, transport: InProcessTransport) -> None:
    """Sends what was held back, whatever the rule is."""
    rule, self.rule = self.rule, _pass
    held, self.held = self.held, []
    for envelope in held:
      transport.send(envelope)
    self.rule = rule


def _pass(envelope: Envelope) -> Iterable[Envelope]:
  return (envelope,)


class Rig:
  """An engine, its workload, and how it is disturbed.

  Attributes:
    engine: Reused by many tests, since compiling costs seconds.
    mail: What happens to its messages.
    failed_rows: Rows of each request, by name, that were not proved.
    failed_at: The same, by name and the furthest that the request had come.
    preempted: Times that each request was computed anew.
    uploads: Where each instance's devices were told to find what they host, in
      order, after nothing.
    expected: Right answers, by name; `step` checks tokens as they come.
  """

  def __init__(self, model: LoadedModel, config: EngineConfig):
    self.mail = Mail()
    self._now_s = 0.0
    self._forged_seqs = itertools.count(10**9)
    self.engine = Engine(
      model,
      config,
      clock=self._clock,
      transport=InProcessTransport(self.mail),
      is_ready=lockstep,  # A run is the same however slow the machine is.
    )
    self.failed_rows: collections.Counter[str] = collections.Counter()
    self.failed_at: collections.Counter[tuple[str, int]] = collections.Counter()
    self.preempted: collections.Counter[str] = collections.Counter()
    self.uploads: list[list[HostedRows]] = [
      [] for _ in range(config.num_instances)
    ]
    self.expected: Mapping[str, tuple[int, ...]] = {}

  def _clock(self) -> float:
    # Of calls, not of time, for the same reason.
    self._now_s += 1e-4
    return self._now_s

  @contextlib.contextmanager
  def watch(self, monkeypatch) -> Iterator[None]:
    """Counts what happens to requests; afterwards nothing is disturbed."""
    self.failed_rows.clear()
    self.failed_at.clear()
    self.preempted.clear()
    self.mail.sent.clear()
    engine = self.engine
    config = engine.config
    nothing = hosted_rows(
      (), (), config.num_instances, config.lending.spill_slots
    )
    for uploads in self.uploads:
      uploads[:] = [nothing]
    with monkeypatch.context() as patch:
      for batcher in engine.batchers:

        def find(uid, batcher=batcher):
          return next(r for r in batcher.running if r.uid == uid)

        def failed(row, find=find, row_failed=batcher.row_failed):
          request = find(row.uid)
          self.failed_rows[request.request_id] += 1
          self.failed_at[request.request_id, request.furthest_tokens] += 1
          row_failed(row)

        def preempt(uid, find=find, preempt=batcher.preempt):
          self.preempted[find(uid).request_id] += 1
          preempt(uid)

        patch.setattr(batcher, "row_failed", failed)
        patch.setattr(batcher, "preempt", preempt)
      upload_hosted = engine.runner.upload_hosted

      def record(instance, rows):
        self.uploads[instance].append(rows)
        upload_hosted(instance, rows)

      patch.setattr(engine.runner, "upload_hosted", record)
      yield
    self.mail.rule = _pass
    self.mail.held.clear()
    self.expected = {}

  def clean(self) -> bool:
    """Ends what a failed test left behind; whether that was possible."""
    for batcher in self.engine.batchers:
      for request in (*batcher.running, *batcher.waiting):
        self.engine.abort(request.request_id)
    for _ in range(1000):
      if not self.engine.has_unfinished() and self._is_all_returned():
        return True
      self.engine.step()
    return False

  def finish(self) -> None:
    """All is over: even late messages find every rBlock free, and leave it so.

    Nobody owes anything, and every spill slot is back.
    """
    engine = self.engine
    self.mail.rule = _pass
    self.mail.release(engine.group.transport)
    for _ in range(1000):  # An answer that was lost is asked for again.
      if self._is_all_returned():
        break
      engine.settle()
    assert self._is_all_returned(), engine.pool_counts()

  def _is_all_returned(self) -> bool:
    slots = self.engine.config.lending.spill_slots
    return all(
      all(c.free == c.total for c in (counts, manager.counts(Tier.HOST)))
      and not manager.lent()
      and not manager.borrowed()
      and manager.num_free_slots == slots
      for counts, manager in zip(
        self.engine.pool_counts(), self.engine.group.managers, strict=True
      )
    )

  def add(self, workload: Mapping[str, Ask]) -> None:
    """Adds requests with prompts that depend only on their names."""
    for name, ask in workload.items():
      self.engine.add_request(
        prompt_of(name, ask.length),
        SamplingParams(max_tokens=ask.count, ignore_eos=True),
        request_id=name,
        instance=ask.instance,
      )

  def forge(self, sender: Address, receiver: InstanceId, body: Body) -> None:
    """Sends a message in the name of somebody who does not know of it."""
    epoch = self.engine.group._gmanagers[0].epoch if sender == GMANAGER else 0
    self.engine.group.transport.send(
      Envelope(
        sender=sender,
        receiver=receiver,
        incarnation=1,
        seq=next(self._forged_seqs),
        body=body,
        meant_for=1,
        leader_epoch=epoch,
      )
    )

  def step(self) -> list[RequestOutput]:
    """One step; every rBlock has one holder and no wrong token comes out."""
    outputs = self.engine.step()
    for output in outputs:
      if output.request_id in self.expected:
        right = self.expected[output.request_id][: len(output.token_ids)]
        assert output.token_ids == right, output.request_id
    check_engine_books(self.engine)
    return outputs

  def drain(
    self,
    before_step: Callable[[], None] = lambda: None,
    max_steps: int = 2000,
  ) -> dict[str, RequestOutput]:
    """Steps until all requests ended.

    Args:
      before_step: Called before each step.
      max_steps: More are a failure.

    Returns:
      Last output of each request.
    """
    finished = {}
    for _ in range(max_steps):
      if not self.engine.has_unfinished():
        return finished
      before_step()
      for output in self.step():
        if output.is_finished:
          finished[output.request_id] = output
    raise AssertionError(f"not done after {max_steps} steps")

  def request(self, name: str) -> Request | None:
    """A running request; None if it waits or has ended."""
    for batcher in self.engine.batchers:
      for request in batcher.running:
        if request.request_id == name:
          return request
    return None

  def lies(self, name: str) -> list[Location]:
    """Where the rBlocks of a running request lie, in order."""
    for batcher, manager in zip(
      self.engine.batchers, self.engine.group.managers, strict=True
    ):
      for request in batcher.running:
        if request.request_id == name:
          table = manager.table(request.uid)
          return [table.location(n) for n in range(table.num_blocks)]
    raise AssertionError(f"{name} does not run")

  def lent(self, name: str) -> list[tuple[int, Location]]:
    """The rBlocks of a running request elsewhere, with logical numbers."""
    lies = self.lies(name)
    home = lies[-1].instance  # The last rBlock never moves.
    return [
      (n, where) for n, where in enumerate(lies) if where.instance != home
    ]

  # Devices.

  def read(self, where: Location) -> tuple[np.ndarray, int]:
    """KV and tag of an rBlock, as its device has them."""
    pool = self.engine.runner.pool.row(where.instance)
    kv, tag = jax.device_get(
      (pool.kv[where.block_id], pool.tag[where.block_id])
    )
    return np.array(kv), int(tag)

  def write(self, where: Location, kv: np.ndarray, tag: int) -> None:
    """Overwrites KV and tag of an rBlock on its device."""
    pool = self.engine.runner.pool.row(where.instance)
    self._replace(
      where.instance,
      kv=pool.kv.at[where.block_id].set(kv),
      tag=pool.tag.at[where.block_id].set(np.uint32(tag)),
    )

  def change_entries(
    self,
    instance: InstanceId,
    change: Callable[[np.ndarray, np.ndarray], None],
  ) -> None:
    """Changes `block_ids` and `logical_ids` on an instance's devices."""
    pool = self.engine.runner.pool.row(instance)
    block_ids, logical_ids = (
      np.array(pool.block_ids),
      np.array(pool.logical_ids),
    )
    change(block_ids, logical_ids)
    self._replace(instance, block_ids=block_ids, logical_ids=logical_ids)

  def place_tables(self, rows: Sequence[Sequence[RowInput]]) -> None:
    """Writes all entries that a group step reads; it has none to write then."""
    runner = self.engine.runner
    for instance, mine in enumerate(rows):
      tables = runner._tables[instance]
      tables.sync([row.entries() for row in mine])
      if tables.num_pending:
        runner.write_entries(instance)
      if (hosted := tables.take_moved()) is not None:
        runner.upload_hosted(instance, hosted)

  def _replace(self, instance: InstanceId, **parts) -> None:
    """Puts something else in the place of parts of a pool."""
    pool = self.engine.runner.pool.row(instance)
    placed = {
      name: jax.device_put(part, getattr(pool, name).sharding)
      for name, part in parts.items()
    }
    self.engine.runner.pool.set_row(instance, pool._replace(**placed))

  def remove(self, where: Location) -> None:
    """Zeroes KV and tag of an rBlock."""
    kv, _ = self.read(where)
    self.write(where, np.zeros_like(kv), 0)

  def swap(self, a: Location, b: Location) -> None:
    """Swaps KV and tags of two rBlocks."""
    content_a, content_b = self.read(a), self.read(b)
    self.write(a, *content_b)
    self.write(b, *content_a)


def prompt_of(name: str, length: int) -> list[int]:
  """Tokens that depend on a request's name alone."""
  rng = np.random.default_rng(list(name.encode()))
  return rng.integers(3, 256, length).tolist()


@functools.cache
def small_rig() -> Rig:
  """Four instances of ten rBlocks each; tests leave it as they found it."""
  return new_rig()


def new_rig(**options: Any) -> Rig:
  """Builds a small rig; `options` are of its configuration."""
  model = load_hf(GOLDEN / "llama3", make_mesh(4, 1), dtype="float32")
  return Rig(
    model,
    engine_config(
      num_instances=4,
      block_size=BLOCK_SIZE,
      num_blocks=11,
      dtype="float32",
      max_num_seqs=4,
      decode_buckets=(4,),
      prefill_buckets=(32,),
      headroom_blocks=0,
      group_prefill_buckets=(32,),
      prefill_rows=2,
      spill_slots=2,
      max_lent_blocks=5,
      exchange_blocks=2,
      resend_after_s=0.01,
      heartbeat_every_s=0.005,
      **options,
    ),
  )


def clean_rig() -> Rig:
  """The small rig; a new one if a failed test left it in a bad state."""
  return usable(small_rig)


def usable(cached: Any) -> Rig:
  """What a cached maker gives; anew if a failed test left it in a bad state."""
  if not cached().clean():
    cached.cache_clear()
  return cached()


@functools.cache
def right_answers() -> dict[str, tuple[int, ...]]:
  """Answers when nothing is disturbed, compared with the dense model."""
  return answers_of(small_rig())


def answers_of(
  rig: Rig,
  kv_dtype: str | None = None,
  kv_scales: np.ndarray | None = None,
) -> dict[str, tuple[int, ...]]:
  """Answers of a small rig when nothing is disturbed, compared likewise."""
  rig.add(WORKLOAD)
  outputs = rig.drain()
  rig.finish()
  oracle = GreedyOracle(
    load_hf(GOLDEN / "llama3", make_mesh(1, 1), dtype="float32").dense(),
    MAX_TOKENS,
    kv_dtype,
    kv_scales,
  )
  for name, ask in WORKLOAD.items():
    answer = outputs[name].token_ids
    assert len(answer) == ask.count
    difference = oracle.first_difference(
      prompt_of(name, ask.length),
      list(answer),
      tolerance("float32", kv_dtype).greedy_tie,
    )
    assert difference is None, f"{name}: {difference}"
  return {name: outputs[name].token_ids for name in WORKLOAD}
