"""An answer that hangs on one rBlock is right wherever that rBlock is.

Four instances whose HBM together has room for less than half of a context with
a needle in each rBlock: the others lend what they may, the rest lies in the
owner's host memory. With one rBlock spoilt in any of the three places the model
alone would answer wrong; coverage says so, and no wrong token comes out.
"""

import collections
import functools

import numpy as np
import pytest

from infinite_llm.cache.slab_store import HeldSlab
from infinite_llm.engine.layered_steps import LayeredSteps
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.types import Tier
from tests.e2e.host_needle_test import slabs_of
from tests.e2e.needle_test import (
  ANSWER_TOKENS,
  NUM_BLOCKS,
  NUM_INSTANCES,
  OWNER,
  Needle,
  ask,
  contexts,
  new_rig_of_needles,
  step_until_answered,
)
from tests.e2e.rig import BLOCK_SIZE, Rig, usable

pytestmark = pytest.mark.slow

MOST_LENT = 6
KEPT = 5


@functools.cache
def rig_of_needles() -> Rig:
  """Of 64 rBlocks, 5 are kept at home and 3 x 6 are lent at most."""
  return new_rig_of_needles(
    num_blocks=11,
    prefill_buckets=(64,),
    group_prefill_buckets=(64,),
    max_lent_blocks=MOST_LENT,
    exchange_blocks=4,
    host_blocks=65,
    host_attention=True,
  )


@pytest.fixture
def rig(monkeypatch):
  rig = usable(rig_of_needles)
  with rig.watch(monkeypatch):
    yield rig
  rig.finish()


def place_of(where) -> str:
  if where.tier is Tier.HOST:
    return "host"
  return "home" if where.instance == OWNER else "lent"


def of_each_place(rig) -> dict[str, list[int]]:
  """Which rBlocks of the context are where."""
  found = collections.defaultdict(list)
  for block, where in enumerate(rig.lies("asked")[:NUM_BLOCKS]):
    found[place_of(where)].append(block)
  return found


def remove(rig, block: int) -> None:
  """Zeroes an rBlock where it is; no book knows."""
  where = rig.lies("asked")[block]
  if where.tier is Tier.HBM:
    rig.remove(where)
    return
  slabs = slabs_of(rig)
  for n, slab in enumerate(slabs):
    numbers = np.asarray(slab.tables.logical_ids)[1:].tolist()
    if block in numbers:
      at = 1 + numbers.index(block)
      slabs[n] = HeldSlab(
        layers=tuple(layer.at[at].set(0) for layer in slab.layers),
        tag=slab.tag.at[at].set(0),
        tables=slab.tables,
      )
      return
  raise AssertionError(f"rBlock {block} is in no slab")


def raw_answer(rig, needle: Needle) -> tuple[int, bool]:
  """What the model says after `@name is`, and whether coverage proves it.

  The step is launched by hand, beside the engine: nobody looks at the proof.
  """
  engine, request = rig.engine, rig.request("asked")
  group = engine.group
  row = RowInput(
    token_ids=(needle.name, needle.told[0]),
    start=request.num_computed_tokens,
    table=group.managers[OWNER].table(request.uid),
  )
  layered = engine._launcher._layered
  assert isinstance(layered, LayeredSteps)
  group.install_tables()
  nobody = [{}] * (NUM_INSTANCES - 1)
  slots = group.slots([{request.uid: 0}, *nobody])
  (output, *_), _ = layered.group_step([{request.uid: row}, *nobody], slots)
  logits = np.asarray(output.logits[0])
  assert np.isfinite(logits).all()
  return int(logits.argmax()), bool(output.proved[0])


def test_keys_in_all_places_are_found(rig):
  context, _ = contexts()
  ask(rig, context, context.chain[0], len(context.answer))
  step_until_answered(rig)
  places = of_each_place(rig)
  assert len(places["lent"]) == (NUM_INSTANCES - 1) * MOST_LENT
  assert len(places["home"]) <= KEPT
  assert len(places["host"]) >= NUM_BLOCKS // 2
  answer = rig.drain()["asked"].token_ids
  assert list(answer) == context.answer
  assert not rig.failed_rows


def test_without_its_rblock_each_answer_is_wrong_and_coverage_says_so(rig):
  context, _ = contexts()
  ask(rig, context, context.chain[0], 4)
  step_until_answered(rig)
  lies = rig.lies("asked")
  # Room for two tokens that no step of the engine has computed.
  assert len(lies) * BLOCK_SIZE >= rig.request("asked").num_computed_tokens + 2
  places = of_each_place(rig)
  for block in (*places["lent"][::5], *places["host"][::8], places["home"][0]):
    needle = context.needles[block]
    key = needle.told[1]
    assert raw_answer(rig, needle) == (key, True), block
    slabs = list(slabs_of(rig))
    whole = rig.read(lies[block]) if lies[block].tier is Tier.HBM else None
    remove(rig, block)
    answer, is_proved = raw_answer(rig, needle)
    assert answer != key, block
    assert not is_proved, block
    slabs_of(rig)[:] = slabs
    if whole is not None:
      rig.write(lies[block], *whole)
    assert raw_answer(rig, needle) == (key, True), block
  rig.drain()


@pytest.mark.parametrize("place", ["lent", "host", "home"])
def test_a_spoilt_rblock_is_computed_anew(rig, place):
  """Nobody repairs it: the request goes back to its tokens."""
  context, _ = contexts()
  ask(rig, context, context.chain[0], 4)
  step_until_answered(rig)
  # The next request is laid out as this one is.
  there = of_each_place(rig)[place]
  at, block = next(
    (n, b) for n, b in enumerate(context.chain[:-1]) if b in there
  )
  rig.engine.abort("asked")
  rig.drain()
  count = 2 * ANSWER_TOKENS
  ask(rig, context, block, count)
  step_until_answered(rig)
  assert place_of(rig.lies("asked")[block]) == place
  remove(rig, block)
  answer = rig.drain()["asked"].token_ids
  first = at * ANSWER_TOKENS
  assert list(answer) == context.answer[first : first + count]
  assert rig.failed_rows["asked"] == 2
  assert rig.preempted["asked"] == 1
