"""The engine's greedy output is the dense model's, wherever the rBlocks lie."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.scheduler.account import Phase
from tests.e2e.rig import Ask, Rig, prompt_of
from tests.testing import GOLDEN, GreedyOracle
from tests.tolerances import tolerance

MAX_TOKENS = 256
MOST_OUTPUT = 12
NUM_BLOCKS = {  # So small that few contexts fit in one instance.
  (1, 16): 12,
  (2, 16): 7,
  (4, 16): 5,
  (1, 64): 5,
  (2, 64): 3,
  (4, 64): 3,
}
NUM_EXAMPLES = {1: 15, 2: 60, 4: 60}

ONE_TOKEN_AT_HOME = "all but one token lies elsewhere"
CHUNK_AT_HOME = "all before a prefill chunk lies elsewhere"
EMPTY_INSTANCE = "an instance has nothing"


class Drawn(NamedTuple):
  """A request of a drawn workload.

  Attributes:
    ask: What it is.
    to: Where its full rBlocks are sent whenever a step completed one, so that
      only the last one is at home; None leaves them where they are until their
      owner runs short.
  """

  ask: Ask
  to: int | None = None


class Splits:
  """How requests were spread in the group steps that computed them.

  Attributes:
    spread: Uids of requests with rBlocks on several instances in some step.
    rows: Rows of group steps, by how their requests were split.
  """

  def __init__(self, num_instances: int):
    self.spread: set[int] = set()
    self.rows: collections.Counter[str] = collections.Counter()
    self._num_instances = num_instances

  def note(self, row: RowInput) -> None:
    creditors = row.table.creditors()
    if not creditors:
      return
    self.spread.add(row.table.uid)
    block_size = row.table.block_size
    at_home = sum(
      min(block_size, row.end - logical_id * block_size)
      for logical_id in row.entries().logical_ids.tolist()
    )
    self.rows[ONE_TOKEN_AT_HOME] += at_home == 1
    self.rows[CHUNK_AT_HOME] += at_home == len(row.token_ids) > 1
    self.rows[EMPTY_INSTANCE] += 1 + len(creditors) < self._num_instances


@functools.cache
def rig_for(num_instances: int, block_size: int, dtype: str) -> Rig:
  """An engine with tiny pools; kept, since compiling costs seconds."""
  model = load_hf(GOLDEN / "llama3", make_mesh(num_instances, 1), dtype=dtype)
  return Rig(
    model,
    engine_config(
      num_instances=num_instances,
      block_size=block_size,
      num_blocks=NUM_BLOCKS[num_instances, block_size],
      dtype=dtype,
      max_num_seqs=4,
      decode_buckets=(4,),
      prefill_buckets=(32,),
      headroom_blocks=0,
      group_prefill_buckets=(32,),
      prefill_rows=2,
      spill_slots=2,
      exchange_blocks=2,
      resend_after_s=0.01,
      heartbeat_every_s=0.005,
    ),
  )


@functools.cache
def oracle_for(dtype: str) -> GreedyOracle:
  model = load_hf(GOLDEN / "llama3", make_mesh(1, 1), dtype=dtype)
  return GreedyOracle(model.dense(), MAX_TOKENS)


@st.composite
def workloads(draw, num_instances: int, block_size: int):
  """Requests; where there are several instances the first is on some of them.

  Either it is longer than what an instance holds, or its rBlocks are sent away.
  """
  own = (NUM_BLOCKS[num_instances, block_size] - 1) * block_size
  longest = min(num_instances * own, MAX_TOKENS) - MOST_OUTPUT - 4
  instances = st.integers(0, num_instances - 1)

  def lengths(least: int, most: int):
    """Any, and one token before, at and behind the ends of rBlocks."""
    ends = st.integers(least // block_size, most // block_size).flatmap(
      lambda n: st.sampled_from([n * block_size + d for d in (-1, 0, 1)])
    )
    return st.one_of(st.integers(least, most), ends).map(
      lambda length: min(max(length, least), most)
    )

  def asks(least: int, most: int, least_output: int = 1):
    counts = st.integers(least_output, MOST_OUTPUT)
    return st.builds(Ask, lengths(least, most), counts, instances)

  def sent(requests):
    shifts = st.integers(1, num_instances - 1)
    return st.tuples(requests, shifts).map(
      lambda both: Drawn(both[0], (both[0].instance + both[1]) % num_instances)
    )

  short = asks(1, own // 2).map(Drawn)
  if num_instances == 1:
    first = asks(1, longest).map(Drawn)
  else:
    short = st.one_of(short, sent(asks(1, own // 2)))
    first = st.one_of(
      asks(own + 1, longest).map(Drawn),
      # A prompt may be computed in one step: then a second one must follow.
      sent(asks(block_size, own, 2)),
      sent(asks(own + 1, longest)),
    )
  others = draw(st.lists(short, max_size=2))
  return [draw(first), *others], draw(st.integers(0, 2**32 - 1))


def send_away(rig: Rig, requests: Mapping[str, Drawn]) -> None:
  """Moves all full rBlocks of some requests to other instances, and waits.

  Args:
    rig: The engine, between two steps.
    requests: By name; those without `to` are left alone.
  """
  num_instances = rig.engine.config.num_instances
  for name, (ask, to) in requests.items():
    request = rig.request(name)
    if to is None or request is None:
      continue
    manager = rig.engine.group.managers[ask.instance]
    for n in range(num_instances):
      dst = (to + n) % num_instances
      if rig.request(name) is None:  # Its last step was over meanwhile.
        break
      num_blocks = manager.movable_blocks(request.uid)
      if dst == ask.instance or not num_blocks:
        continue
      manager.move_kvcache(request.uid, num_blocks, dst)
      for _ in range(1000):
        if rig.request(name) is None:
          break
        if manager.phase(request.uid) is Phase.IDLE:
          break
        rig.engine.settle()
      is_over = rig.request(name) is None
      assert is_over or manager.phase(request.uid) is Phase.IDLE


def check_workload(rig: Rig, dtype: str, requests, seed: int) -> Splits:
  """Runs requests together; each must get what the dense model says."""
  engine = rig.engine
  assert rig.clean()
  splits = Splits(engine.config.num_instances)
  drawn = {f"{seed}-{i}": request for i, request in enumerate(requests)}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine.runner, "group_step", _noting(engine.runner, splits))
    rig.add({name: ask for name, (ask, _) in drawn.items()})
    outputs = rig.drain(lambda: send_away(rig, drawn))
  rig.finish()
  for name, (ask, _) in drawn.items():
    output = outputs[name]
    assert output.finish_reason == "length", output.error
    assert len(output.token_ids) == ask.count
    difference = oracle_for(dtype).first_difference(
      prompt_of(name, ask.length),
      list(output.token_ids),
      tolerance(dtype).greedy_tie,
    )
    assert difference is None, difference
  return splits


def _noting(runner, splits: Splits) -> Callable:
  group_step = runner.group_step

  def noted(rows, slots, **options):
    for mine in rows:
      for row in mine:
        splits.note(row)
    return group_step(rows, slots, **options)

  return noted


@pytest.mark.parametrize(
  ("num_instances", "block_size"),
  [
    (2, 16),
    (4, 64),
    pytest.param(1, 16, marks=pytest.mark.slow),
    pytest.param(1, 64, marks=pytest.mark.slow),
    pytest.param(2, 64, marks=pytest.mark.slow),
    pytest.param(4, 16, marks=pytest.mark.slow),
  ],
)
def test_greedy_output_equals_the_dense_model(num_instances, block_size):
  rig = rig_for(num_instances, block_size, "float32")
  splits = []

  @hypothesis.settings(
    max_examples=NUM_EXAMPLES[num_instances],
  )
  @hypothesis.given(workloads(num_instances, block_size))
  def check(workload):
    splits.append(check_workload(rig, "float32", *workload))

  check()
  rows = sum((case.rows for case in splits), collections.Counter())
  num_spread = sum(bool(case.spread) for case in splits)
  if num_instances == 1:
    assert not num_spread
    return
  assert num_spread >= 0.9 * len(splits), (num_spread, len(splits))
  # An owner has at least the token that it computes, so that only a third
  # instance can have nothing.
  assert rows[ONE_TOKEN_AT_HOME] > 0, rows
  assert rows[CHUNK_AT_HOME] > 0, rows
  assert (rows[EMPTY_INSTANCE] > 0) == (num_instances > 2), rows


def test_bfloat16_output_equals_the_dense_bfloat16_model():
  rig = rig_for(4, 16, "bfloat16")
  for seed, length in enumerate((17, 130, 225)):
    requests = [Drawn(Ask(length, MOST_OUTPUT, seed), (seed + 1) % 4)]
    splits = check_workload(rig, "bfloat16", requests, seed)
    assert splits.spread
