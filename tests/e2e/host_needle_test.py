"""An answer that hangs on one rBlock in HOST is right only if it is intact.

One instance whose HBM has room for a quarter of a context with a needle in each
rBlock, in float8: most lie in host memory. With one of them gone, misplaced or
stale the model alone would answer wrong; coverage says so, and no wrong token
comes out.
"""

import functools
import pathlib
import tempfile

import numpy as np
import pytest

from infinite_llm.cache.slab_store import HeldSlab
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.layered_steps import LayeredSteps
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.models.needle import build_needle_checkpoint
from infinite_llm.types import Tier
from tests.e2e.needle_test import (
  ANSWER_TOKENS,
  NUM_BLOCKS,
  ask,
  contexts,
  step_until_answered,
)
from tests.e2e.rig import BLOCK_SIZE, Rig, usable

FAULTS = ("removed", "misplaced", "stale")
# Of two layers' keys and values: they are of very different sizes.
SCALES = np.array([[[0.11], [0.007]], [[0.007], [0.007]]])


@functools.cache
def rig_of_needles() -> Rig:
  with tempfile.TemporaryDirectory() as folder:
    path = build_needle_checkpoint(
      pathlib.Path(folder, "needle"), corpus="", vocab_size=2400
    )
    model = load_hf(path, make_mesh(1, 1), dtype="float32")
  return Rig(
    model,
    engine_config(
      block_size=BLOCK_SIZE,
      num_blocks=17,
      host_blocks=81,
      host_attention=True,
      dtype="float32",
      kv_dtype="float8_e4m3fn",
      kv_scales=SCALES,
      max_num_seqs=2,
      decode_buckets=(2,),
      prefill_buckets=(128,),
      prefill_rows=1,
    ),
  )


@pytest.fixture
def rig(monkeypatch):
  rig = usable(rig_of_needles)
  with rig.watch(monkeypatch):
    yield rig
  rig.finish()


def slabs_of(rig) -> list[HeldSlab]:
  """What is held in host memory of the request, to be changed."""
  return rig.engine.group.host_tiers.slabs[0]._slabs[rig.request("asked").uid]


def spoilt(slabs: list[HeldSlab], block: int, fault: str, old) -> list:
  """The slabs with one rBlock disturbed; no book knows."""
  size = len(np.asarray(slabs[0].tag)) - 1
  at, place = divmod(block, size)
  slab = slabs[at]
  match fault:
    case "removed":
      changed = HeldSlab(
        layers=tuple(layer.at[1 + place].set(0) for layer in slab.layers),
        tag=slab.tag.at[1 + place].set(0),
        tables=slab.tables,
      )
    case "misplaced":  # Another slab with its tags, in this one's place.
      other = slabs[at - 1]
      changed = HeldSlab(layers=other.layers, tag=other.tag, tables=slab.tables)
    case "stale":
      changed = old[at]
  return [*slabs[:at], changed, *slabs[at + 1 :]]


def old_slabs(rig) -> list[HeldSlab]:
  """What the older context had in host memory."""
  older = contexts()[1]
  ask(rig, older, older.chain[0], 4)
  step_until_answered(rig)
  slabs = list(slabs_of(rig))
  rig.engine.abort("asked")
  rig.drain()
  return slabs


def raw_answer(rig, needle, slabs) -> tuple[int, bool]:
  """What the model says after `@name is`, and whether coverage proves it.

  The step is launched by hand, beside the engine: nobody looks at the proof.
  """
  engine, request = rig.engine, rig.request("asked")
  row = RowInput(
    token_ids=(needle.name, needle.told[0]),
    start=request.num_computed_tokens,
    table=engine.group.managers[0].table(request.uid),
  )
  layered = engine._launcher._layered
  assert isinstance(layered, LayeredSteps)
  output = layered._launch(0, [row], slabs, bucket=layered._buckets[-1])
  logits = np.asarray(output.logits[0])
  assert np.isfinite(logits).all()
  return int(logits.argmax()), bool(output.proved[0])


def test_keys_in_both_tiers_are_found(rig):
  context, _ = contexts()
  count = 24 * ANSWER_TOKENS
  ask(rig, context, context.chain[0], count)
  step_until_answered(rig)
  tiers = [where.tier for where in rig.lies("asked")[:NUM_BLOCKS]]
  assert tiers.count(Tier.HOST) >= 3 * NUM_BLOCKS // 4
  assert len({tiers[block] for block in context.chain[:24]}) == 2
  answer = rig.drain()["asked"].token_ids
  assert list(answer) == context.answer[:count]
  assert not rig.failed_rows


def test_without_its_rblock_each_answer_is_wrong_and_coverage_says_so(rig):
  context, older = contexts()
  old = old_slabs(rig)
  ask(rig, context, context.chain[0], 4)
  step_until_answered(rig)
  lies, slabs = rig.lies("asked"), list(slabs_of(rig))
  # Room for two tokens that no step of the engine has computed.
  assert len(lies) * BLOCK_SIZE >= rig.request("asked").num_computed_tokens + 2
  in_host = [n for n, where in enumerate(lies) if where.tier is Tier.HOST]
  assert len(in_host) >= 3 * NUM_BLOCKS // 4
  for block in in_host[::4]:
    needle = context.needles[block]
    key = needle.told[1]
    assert raw_answer(rig, needle, slabs) == (key, True), block
    for fault in FAULTS:
      answer, is_proved = raw_answer(
        rig, needle, spoilt(slabs, block, fault, old)
      )
      assert answer != key, (block, fault)
      assert not is_proved, (block, fault)
      if fault == "stale":
        assert answer == older.needles[block].told[1], block
  rig.drain()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_rblock_is_computed_anew(rig, fault):
  """Nobody repairs it: the request goes back to its tokens."""
  context, _ = contexts()
  old = old_slabs(rig)
  block = next(b for b in context.chain if b < NUM_BLOCKS // 2)
  at = context.chain.index(block)
  count = 2 * ANSWER_TOKENS
  ask(rig, context, block, count)
  step_until_answered(rig)
  assert rig.lies("asked")[block].tier is Tier.HOST
  slabs = slabs_of(rig)
  slabs[:] = spoilt(slabs, block, fault, old)
  answer = rig.drain()["asked"].token_ids
  first = at * ANSWER_TOKENS
  assert list(answer) == context.answer[first : first + count]
  assert rig.failed_rows["asked"] == 1
  assert rig.preempted["asked"] == 1
