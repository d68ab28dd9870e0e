"""An answer that hangs on one rBlock is right only if that rBlock is intact.

A context of 64 rBlocks over four instances has a needle in every rBlock. Asked
for each in turn the model answers right; with that rBlock removed, moved or
stale the model alone would answer wrong, coverage says so, and the engine lets
no wrong token out.
"""

import functools
import itertools
import pathlib
import tempfile
from typing import Any, NamedTuple

import numpy as np
import pytest

from infinite_llm.cache.rblock import Location
from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.calibration import calibrate_kv_scales
from infinite_llm.engine.step_batch import RowInput
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.models.needle import build_needle_checkpoint
from infinite_llm.models.needle_tokenizer import (
  BOS_TOKEN,
  END,
  EOS_TOKEN,
  LINK,
  NAMES,
  definition,
  reference,
)
from infinite_llm.rules import scales_as_tuples
from infinite_llm.sampling_params import SamplingParams
from tests.e2e.rig import BLOCK_SIZE, Rig, usable

NUM_BLOCKS = 64
OWNER = 0
NUM_INSTANCES = 4
FAULTS = ("removed", "moved", "stale")
ANSWER_TOKENS = 5  # Of each needle, after the name.


class Needle(NamedTuple):
  """What one rBlock of the context tells.

  Attributes:
    name: Token of the reference to it.
    told: Tokens that follow its definition: " is", the key's halves, and then
      the reference to the next needle or the end.
  """

  name: int
  told: tuple[int, ...]


class Context(NamedTuple):
  """A text with one needle in each rBlock.

  Attributes:
    token_ids: The text.
    needles: That of each rBlock.
    chain: rBlocks in the order of the answer.
  """

  token_ids: list[int]
  needles: list[Needle]
  chain: list[int]

  @property
  def answer(self) -> list[int]:
    """What follows a reference to the first needle of the chain."""
    return [t for block in self.chain for t in self.needles[block].told]


@functools.cache
def load_needle() -> LoadedModel:
  """The needle checkpoint with a tokenizer of bytes."""
  with tempfile.TemporaryDirectory() as folder:
    path = build_needle_checkpoint(
      pathlib.Path(folder, "needle"), corpus="", vocab_size=2400
    )
    return load_hf(path, make_mesh(NUM_INSTANCES, 1), dtype="float32")


def new_rig_of_needles(**options: Any) -> Rig:
  """Four instances, each with room for a good third of the context."""
  return Rig(
    load_needle(),
    engine_config(
      **{
        "num_instances": NUM_INSTANCES,
        "block_size": BLOCK_SIZE,
        "num_blocks": 26,
        "dtype": "float32",
        "max_num_seqs": 2,
        "decode_buckets": (2,),
        "prefill_buckets": (128,),
        "headroom_blocks": 0,
        "group_prefill_buckets": (128,),
        "prefill_rows": 1,
        "spill_slots": 1,
        "exchange_blocks": 8,
        "resend_after_s": 0.01,
        "heartbeat_every_s": 0.005,
        **options,
      }
    ),
  )


rig_of_needles = functools.cache(new_rig_of_needles)


@pytest.fixture
def rig(monkeypatch):
  rig = usable(rig_of_needles)
  with rig.watch(monkeypatch):
    yield rig


def make_context(tokenizer, seed: int) -> Context:
  """Hides a chain of needles; contexts differ by seed in their keys alone."""
  layout = np.random.default_rng(0)
  names = [NAMES[n] for n in layout.permutation(len(NAMES))[:NUM_BLOCKS]]
  chain = layout.permutation(NUM_BLOCKS).tolist()
  starts = layout.integers(1, BLOCK_SIZE - ANSWER_TOKENS, NUM_BLOCKS)
  filler = tokenizer.encode(
    "once upon a midnight dreary, while i pondered, weak and weary. " * 20,
    add_special_tokens=False,
  ).ids[: NUM_BLOCKS * BLOCK_SIZE]
  keys = np.random.default_rng(seed).permutation(900)[:NUM_BLOCKS] + 100
  halves = np.random.default_rng(seed).permutation(1000)[:NUM_BLOCKS]
  token_of = tokenizer.token_to_id
  token_ids = list(filler)
  token_ids[0] = token_of(BOS_TOKEN)
  needles: list = [None] * NUM_BLOCKS
  for block, after in itertools.pairwise([*chain, None]):
    told = [token_of("Ġis"), token_of(f"Ġ{keys[block]}")]
    told.append(token_of(f"{halves[block]:03}"))
    if after is None:
      told += [token_of(END), token_of(EOS_TOKEN)]
    else:
      told += [token_of(LINK), token_of(f" {reference(names[after])}")]
    start = block * BLOCK_SIZE + starts[block]
    needle = [token_of(definition(names[block])), *told]
    token_ids[start : start + len(needle)] = needle
    needles[block] = Needle(token_of(f" {reference(names[block])}"), (*told,))
  assert None not in token_ids
  return Context(token_ids, needles, chain)


@functools.cache
def contexts() -> tuple[Context, Context]:
  """One context, and one with other keys: the older one."""
  tokenizer = load_needle().tokenizer
  return make_context(tokenizer, 1), make_context(tokenizer, 2)


def ask(rig, context: Context, block: int, count: int) -> None:
  """Asks for the needle of an rBlock, and those behind it in the chain."""
  rig.engine.add_request(
    [*context.token_ids, context.needles[block].name],
    SamplingParams(max_tokens=count),
    request_id="asked",
    instance=OWNER,
  )


def step_until_answered(rig) -> None:
  """Steps until the request has its first token."""
  while rig.engine.has_unfinished():
    request = rig.request("asked")
    if request is not None and request.output_token_ids:
      return
    rig.step()
  raise AssertionError("the request ended early")


def old_contents(rig):
  """KV and tag of each rBlock of the older context, as it was computed."""
  older = contexts()[1]
  ask(rig, older, older.chain[0], 4)
  step_until_answered(rig)
  contents = [rig.read(where) for where in rig.lies("asked")[:NUM_BLOCKS]]
  rig.engine.abort("asked")
  rig.drain()
  rig.finish()
  return contents


def spoil(rig, fault: str, where: Location, old) -> None:
  """Disturbs one rBlock on its device; no book knows."""
  match fault:
    case "removed":
      rig.remove(where)
    case "moved":  # With its tag, to another instance.
      rig.swap(where, free_place(rig, where))
    case "stale":
      rig.write(where, *old)


def free_place(rig, where: Location) -> Location:
  """An rBlock that nobody uses, with nothing in it."""
  used = {(at.instance, at.block_id) for at in rig.lies("asked")}
  for instance, block_id in itertools.product(
    range(NUM_INSTANCES), range(25, 0, -1)
  ):
    if instance != where.instance and (instance, block_id) not in used:
      place = Location(instance=instance, block_id=block_id, epoch=where.epoch)
      rig.remove(place)
      return place
  raise AssertionError("no rBlock is free")


def raw_answer(rig, needle: Needle) -> tuple[int, bool]:
  """What the model says after `@name is`, and whether coverage proves it.

  The step is launched by hand, beside the engine: nobody looks at the proof.
  """
  runner, group = rig.engine.runner, rig.engine.group
  request = rig.request("asked")
  start = request.num_computed_tokens
  row = RowInput(
    token_ids=(needle.name, needle.told[0]),
    start=start,
    table=group.managers[OWNER].table(request.uid),
  )
  nobody = [()] * (NUM_INSTANCES - 1)
  group.install_tables()
  slots = group.slots([{request.uid: 0}, *[{} for _ in nobody]])
  outputs = runner.group_step([[row], *nobody], slots, is_prefill=True)
  logits = np.asarray(outputs[OWNER].logits[0])
  assert np.isfinite(logits).all()
  return int(logits.argmax()), bool(outputs[OWNER].proved[0])


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_a_key_in_every_rblock_is_found(rig, monkeypatch, kv_dtype):
  if kv_dtype is not None:
    # By another text, as scales usually are.
    scales = calibrate_kv_scales(load_needle(), [contexts()[1].token_ids])
    scales = scales_as_tuples("kv_scales", scales)
    rig = rig_of_needles(kv_dtype=kv_dtype, kv_scales=scales)
    with rig.watch(monkeypatch):
      check_every_key(rig)
  else:
    check_every_key(rig)


def check_every_key(rig):
  context, _ = contexts()
  ask(rig, context, context.chain[0], len(context.answer))
  step_until_answered(rig)
  holders = [where.instance for where in rig.lies("asked")[:NUM_BLOCKS]]
  assert set(holders) == set(range(NUM_INSTANCES))
  answer = rig.drain()["asked"].token_ids
  assert list(answer) == context.answer
  assert not rig.failed_rows
  rig.finish()


def test_without_its_rblock_each_answer_is_wrong_and_coverage_says_so(rig):
  context, older = contexts()
  old = old_contents(rig)
  ask(rig, context, context.chain[0], 4)
  step_until_answered(rig)
  lies = rig.lies("asked")
  # Room for two tokens that no step of the engine has computed.
  assert len(lies) * BLOCK_SIZE >= rig.request("asked").num_computed_tokens + 2
  for block in range(NUM_BLOCKS):
    needle, where = context.needles[block], lies[block]
    key = needle.told[1]
    assert raw_answer(rig, needle) == (key, True), block
    whole = rig.read(where)
    for fault in FAULTS:
      spoil(rig, fault, where, old[block])
      answer, is_proved = raw_answer(rig, needle)
      assert answer != key, (block, fault)
      assert not is_proved, (block, fault)
      if fault == "stale":
        assert answer == older.needles[block].told[1], block
      rig.write(where, *whole)
  assert {where.instance for where in lies} == set(range(NUM_INSTANCES))
  rig.drain()
  rig.finish()


def test_no_wrong_token_comes_out_whichever_rblock_is_spoilt(rig):
  """Before each key of the chain is told, its rBlock is spoilt for a step."""
  context, _ = contexts()
  old = old_contents(rig)
  ask(rig, context, context.chain[0], len(context.answer))
  spoilt = 0
  answer = ()
  while rig.engine.has_unfinished():
    request = rig.request("asked")
    said = len(request.output_token_ids) if request else 0
    needle, part = divmod(said, ANSWER_TOKENS)
    is_due = part == 1 and needle == spoilt
    unproved = rig.engine.num_unproved_rows
    if is_due:
      block = context.chain[needle]
      where = rig.lies("asked")[block]
      whole = rig.read(where)
      spoil(rig, FAULTS[needle % 3], where, old[block])
      spoilt += 1
    outputs = rig.step()
    if is_due:
      assert not outputs
      assert rig.engine.num_unproved_rows == unproved + 1
      rig.write(where, *whole)
    for output in outputs:
      answer = output.token_ids
      assert list(answer) == context.answer[: len(answer)]
  assert list(answer) == context.answer
  assert spoilt == NUM_BLOCKS
  assert not rig.preempted
  rig.finish()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", ["lent", "home"])
def test_a_spoilt_rblock_is_computed_anew(rig, fault, place):
  """Nobody repairs it: the request goes back to its tokens."""
  context, _ = contexts()
  old = old_contents(rig)
  ask(rig, context, context.chain[0], 4)
  step_until_answered(rig)
  # The next request is laid out as this one is.
  at = next(
    n
    for n, block in enumerate(context.chain)
    if (rig.lies("asked")[block].instance == OWNER) == (place == "home")
  )
  rig.engine.abort("asked")
  rig.drain()
  block = context.chain[at]
  count = 2 * ANSWER_TOKENS
  ask(rig, context, block, count)
  step_until_answered(rig)
  lies = rig.lies("asked")
  assert (lies[block].instance == OWNER) == (place == "home")
  spoil(rig, fault, lies[block], old[block])
  answer = rig.drain()["asked"].token_ids
  first = at * ANSWER_TOKENS
  assert list(answer) == context.answer[first : first + count]
  assert rig.failed_rows["asked"] == 2
  assert rig.preempted["asked"] == 1
  rig.finish()
