"""Requests larger than the HBM of a whole group: lent rBlocks, and HOST.

Two instances of 8 rBlocks of 16 tokens each. A request of more than 256 tokens
keeps 4 rBlocks at home, has up to 8 at the other instance and the others in
its own host memory. Every copy is verified.
"""

import collections

import jax
import numpy as np
import pytest

from infinite_llm.errors import CapacityError
from infinite_llm.scheduler.account import Phase
from infinite_llm.scheduler.lease_messages import Renew
from infinite_llm.types import Tier
from tests.engine.layered_steps_test import (
  MAX_TOKENS,
  WAYS,
  add,
  build,
  check,
  host_is_empty,
  is_clean,
  load,
  num_host,
  num_steps,
  prompt_of,
  request_of,
  sampling_of,
  spoil,
  step_until,
)
from tests.testing import (
  GreedyOracle,
  SamplingOracle,
  drain,
  pools_are_empty,
  write_shallow_checkpoint,
)
from tests.tolerances import tolerance

CAPACITY = 16 * (4 + 8 + 32)


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("layered_group")
  return write_shallow_checkpoint(folder, num_layers=2)


@pytest.fixture(scope="module", name="oracle")
def _oracle(checkpoint):
  return SamplingOracle(load(checkpoint).dense(), CAPACITY)


@pytest.fixture(scope="module", name="lending_engine")
def _lending_engine(checkpoint):
  return build(load(checkpoint, 2), num_instances=2)


@pytest.fixture(name="lenders")
def _lenders(lending_engine):
  """Two instances that lend."""
  yield lending_engine
  assert is_clean(lending_engine)


@pytest.fixture(name="wide_lenders")
def _wide_lenders(checkpoint):
  """Two instances that lend, of two tensor ranks each."""
  model = load(checkpoint, 2, 2)
  engine = build(model, num_instances=2, tensor_parallel=2)
  yield engine
  assert is_clean(engine)


def places(engine, name) -> collections.Counter[tuple[int, Tier]]:
  """How many rBlocks of a request are where; empty while it does not run."""
  entry = engine._book.find(name)
  if entry is None or (
    entry.request not in engine.batchers[entry.instance].running
  ):
    return collections.Counter()
  table = engine.group.managers[entry.instance].table(entry.request.uid)
  lies = map(table.location, range(table.num_blocks))
  return collections.Counter((where.instance, where.tier) for where in lies)


def is_everywhere(engine, name, owner=0) -> bool:
  """Whether a request has rBlocks in all three places."""
  return places(engine, name).keys() == {
    (owner, Tier.HBM),
    (owner, Tier.HOST),
    (1 - owner, Tier.HBM),
  }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [257, 400, 640])
def test_a_context_beyond_the_hbm_of_all_gives_the_dense_tokens(
  lenders, oracle, length, way
):
  before = dict(lenders.runner.launches)
  unproved = lenders.num_unproved_rows
  asked = dict([add(lenders, length, 20, instance=0, **way)])
  (long,) = asked
  asked |= dict(
    add(lenders, 9 + n, 12, text=n, instance=n, **WAYS[n]) for n in (0, 1)
  )
  most = collections.Counter()
  for _ in range(2000):
    if not lenders.has_unfinished():
      break
    for output in lenders.step():
      if output.is_finished:
        check(oracle, output, asked.pop(output.request_id))
    most |= places(lenders, long)
  assert not asked
  # The other instance lends all that it does not need itself.
  assert most[1, Tier.HBM] >= 6
  assert most[0, Tier.HOST] >= 2
  launches = lenders.runner.launches
  for kind in ("layered_group_prefill", "layered_group_decode"):
    assert launches[kind] > before.get(kind, 0), kind
  assert lenders.num_unproved_rows == unproved


def test_one_that_borrows_goes_on_where_it_is_when_that_is_not_enough(
  lenders, oracle
):
  """Nothing is computed twice: as many rows are decoded as tokens asked for."""
  before = dict(lenders.runner.launches)
  name, sampling = add(lenders, 240, 60, instance=0)
  step_until(lenders, lambda: is_everywhere(lenders, name))
  finished = drain(lenders)
  check(oracle, finished[name], sampling)
  decoded = sum(
    lenders.runner.launches[kind] - before.get(kind, 0)
    for kind in (
      "local_decode",
      "group_decode",
      "layered_decode",
      "layered_group_decode",
    )
  )
  assert decoded == 59


def test_it_borrows_again_once_somebody_else_needs_less(lenders, oracle):
  """What it has in HOST by then stays there."""
  asked = dict([add(lenders, 90, 30, text=5, instance=1)])
  long, sampling = add(lenders, 290, 60, instance=0)
  asked[long] = sampling
  step_until(lenders, lambda: num_host(lenders, long) > 0)
  before, unproved = places(lenders, long), lenders.group.num_unproved_moves
  finished = step_until(
    lenders,
    lambda: places(lenders, long)[1, Tier.HBM] > before[1, Tier.HBM] + 2,
  )
  assert places(lenders, long)[0, Tier.HOST] >= before[0, Tier.HOST]
  finished |= drain(lenders)
  for name, way in asked.items():
    check(oracle, finished[name], way)
  assert lenders.group.num_unproved_moves == unproved


def test_the_largest_context_is_filled_to_its_last_token(lenders, oracle):
  assert lenders.capacity_tokens == CAPACITY
  with pytest.raises(CapacityError, match=r"hold 704: .* \(576 with host mem"):
    lenders.add_request(prompt_of(CAPACITY), sampling_of(1))
  name, sampling = add(lenders, CAPACITY - 12, 12, instance=1)
  finished = drain(lenders)
  check(oracle, finished[name], sampling)


def test_what_fits_in_the_hbm_of_all_needs_no_host_memory(lenders, oracle):
  before = dict(lenders.runner.launches)
  name, sampling = add(lenders, 230, 20, instance=0)
  finished = drain(lenders)
  check(oracle, finished[name], sampling)
  launches = lenders.runner.launches
  assert launches["group_decode"] > before.get("group_decode", 0)
  for kind in launches:
    if kind.startswith("layered"):
      assert launches[kind] == before.get(kind, 0), kind


def test_nobody_who_lends_is_needed(checkpoint, oracle):
  """By its policy no instance lends: a request has its own two tiers."""
  engine = build(load(checkpoint, 2), num_instances=2, policy="static")
  assert engine.capacity_tokens == 576
  name, sampling = add(engine, 300, 8, instance=1)
  finished = drain(engine)
  check(oracle, finished[name], sampling)
  assert not engine.group.num_blocks_moved
  assert engine.runner.launches["layered_decode"] >= 7
  assert is_clean(engine)


def test_two_that_need_all_others_lend_come_one_after_the_other(
  lenders, oracle
):
  """Else each would wait for ever for what the other one has."""
  asked = dict(add(lenders, 650 + n, 6, text=n, instance=n) for n in range(2))
  preempted = []
  for batcher in lenders.batchers:
    batcher.preempt = lambda uid, own=batcher: (
      preempted.append(uid),
      type(own).preempt(own, uid),
    )
  finished = drain(lenders, max_steps=3000)
  for batcher in lenders.batchers:
    del batcher.preempt
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert len(preempted) <= 1


def test_the_youngest_that_gave_way_waits_until_another_has_ended(
  checkpoint, oracle
):
  """Else it takes again what it gave up, before the others can borrow it.

  Two grow until nobody lends any more, beside one beyond all HBM: that keeps
  its share of its own instance's, and what is free there is not lent.
  """
  engine = build(load(checkpoint, 3), num_instances=3, headroom_blocks=2)
  asked = dict(add(engine, 125, 64, text=n, instance=n) for n in range(2))
  asked |= dict([add(engine, 560, 30, text=7, instance=2)])
  gave_way, finished = [], {}
  give_up = engine.stall.give_up
  engine.stall.give_up = lambda uid, *, is_alone: (
    gave_way.append(uid),
    give_up(uid, is_alone=is_alone),
  )
  while engine.has_unfinished():
    for output in engine.step():
      if output.is_finished:
        finished[output.request_id] = output
    assert len(gave_way) <= 2
  assert gave_way in ([3], [3, 2])
  # The first ends with all that it needs; the others come back then.
  assert next(iter(finished)) == next(iter(asked))
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert is_clean(engine)


def test_what_it_lent_is_not_recalled(lenders):
  """It lent that to have no more than its share at home."""
  name, _ = add(lenders, 400, 8, instance=0)
  step_until(lenders, lambda: is_everywhere(lenders, name))
  manager = lenders.group.managers[0]
  assert not manager.recall_kvcache(request_of(lenders, name).uid, 1, 1)
  lenders.abort(name)
  drain(lenders)


def test_creditors_hear_of_their_owner_while_slabs_come(
  lenders, oracle, monkeypatch
):
  """A step may take longer than a lease; nobody else could say so."""
  name, sampling = add(lenders, 400, 6, instance=0)
  step_until(lenders, lambda: is_everywhere(lenders, name))
  kind = "layered_group_decode"
  before = lenders.runner.launches[kind]
  sent, send = [], lenders.group.transport.send
  with monkeypatch.context() as patch:
    layered = lenders._launcher._layered
    patch.setattr(layered, "_meanwhile", lenders.group.renew)
    patch.setattr(
      lenders.group.transport,
      "send",
      lambda envelope: (sent.append(envelope), send(envelope)),
    )
    finished = drain(lenders)
  check(oracle, finished[name], sampling)
  renewals = [each for each in sent if isinstance(each.body, Renew)]
  assert {(each.sender, each.receiver) for each in renewals} == {(0, 1)}
  num_steps = lenders.runner.launches[kind] - before
  assert num_steps >= 5
  assert len(renewals) >= num_steps * lenders._model.config.num_layers


@pytest.mark.slow
@pytest.mark.parametrize("instance", [0, 1])
def test_each_instance_has_one_and_they_lend_each_other(
  lenders, oracle, instance
):
  asked = dict([add(lenders, 400, 16, instance=instance)])
  asked |= dict([add(lenders, 300, 12, text=3, instance=1 - instance)])
  asked |= dict(
    [add(lenders, 20 + n, 10, text=n, instance=n % 2) for n in range(4)]
  )
  asked |= dict([add(lenders, 150, 6, text=7, instance=instance)])
  finished = drain(lenders)
  for name, sampling in asked.items():
    check(oracle, finished[name], sampling)
  assert lenders.num_unproved_rows == 0


def test_it_may_be_aborted_after_any_step(lenders, oracle, monkeypatch):
  seen = set()
  for step in range(num_steps(lenders, monkeypatch, 290, instance=0)):
    name, _ = add(lenders, 290, 6, instance=0)
    short = add(lenders, 20, 4, text=3, instance=1)
    finished = {}
    for _ in range(step):
      for output in lenders.step():
        finished[output.request_id] = output
    if places(lenders, name):
      uid = request_of(lenders, name).uid
      phase = lenders.group.managers[0].phase(uid)
      seen.add((phase, is_everywhere(lenders, name)))
    lenders.abort(name)
    finished |= drain(lenders)
    check(oracle, finished[short[0]], short[1])
    lenders.settle()
    assert pools_are_empty(lenders)
    assert host_is_empty(lenders)
  assert {(Phase.IDLE, True), (Phase.OVERFLOWING, False)} <= seen, seen
  assert {phase for phase, _ in seen} & {Phase.SWITCHED, Phase.RESERVING}, seen


def untag_lent(engine, name) -> None:
  """Spoils an rBlock of a request at the other instance; no book knows."""
  uid = request_of(engine, name).uid
  table = engine.group.managers[0].table(uid)
  _, where = table.hosted_entries(1)[0]
  pool = engine.runner.pool.row(1)
  tag = pool.tag.at[where.block_id].set(0)
  engine.runner.pool.set_row(
    1, pool._replace(tag=jax.device_put(tag, pool.tag.sharding))
  )


@pytest.mark.parametrize("fault", ["lent", "untagged", "swapped", "missing"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_spoilt_rblock_is_noticed_wherever_it_is(
  lenders, oracle, fault, when
):
  """Its step proves nothing, no token comes of it; then all is computed anew.

  The first time, what the other instance holds is asked for once more.
  """
  name, sampling = add(lenders, 400, 8, instance=0)
  request = request_of(lenders, name)
  unproved = lenders.num_unproved_rows
  step_until(
    lenders,
    lambda: (
      num_host(lenders, name) >= 6
      and is_everywhere(lenders, name)
      and (when == "prefill" or len(request.output_token_ids) == 3)
    ),
  )
  answered = list(request.output_token_ids)
  if fault == "lent":
    untag_lent(lenders, name)
  else:
    spoil(lenders, name, fault)
  step_until(lenders, lambda: lenders.num_unproved_rows == unproved + 2)
  assert request.output_token_ids == answered
  finished = drain(lenders)
  check(oracle, finished[name], sampling)
  assert lenders.num_unproved_rows == unproved + 2


@pytest.mark.slow
def test_random_schedules_end_right_and_leave_nothing(wide_lenders, oracle):
  lenders, seen = wide_lenders, set()
  for seed in range(3):
    rng = np.random.default_rng(seed)
    arrivals = sorted(rng.integers(0, 40, 9).tolist())
    aborts = rng.integers(5, 120, 2).tolist()
    asked, finished, step = {}, {}, 0
    while arrivals or lenders.has_unfinished():
      while arrivals and arrivals[0] <= step:
        arrivals.pop(0)
        sizes = (200, 550) if rng.integers(3) == 0 else (1, 120)
        name, sampling = add(
          lenders,
          int(rng.integers(*sizes)),
          int(rng.integers(2, 36)),
          text=int(rng.integers(99)),
          instance=int(rng.integers(2)),
          **rng.choice(WAYS),
        )
        asked[name] = sampling
      if step in aborts and asked:
        lenders.abort(str(rng.choice(list(asked))))
      for output in lenders.step():
        if output.is_finished:
          finished[output.request_id] = output
      for name in asked:
        seen |= set(places(lenders, name))
      step += 1
    for name, sampling in asked.items():
      if finished[name].finish_reason != "abort":
        check(oracle, finished[name], sampling)
    assert is_clean(lenders)
  assert len(seen) == 4
  launches = lenders.runner.launches
  assert launches["layered_group_prefill"]
  assert launches["layered_group_decode"]


@pytest.mark.slow
def test_float8_gives_the_tokens_of_a_model_that_rounds_alike(checkpoint):
  """They are rounded once, and multiplied by their scales wherever they are."""
  model = load(checkpoint, 2)
  shape = (2, 2, model.config.num_kv_heads)
  scales = 0.01 * (1 + np.arange(np.prod(shape)).reshape(shape) / 4)
  kind = "float8_e4m3fn"
  engine = build(model, num_instances=2, kv_dtype=kind, kv_scales=scales)
  name, _ = add(engine, 400, 16, instance=0)
  finished = drain(engine)
  assert is_clean(engine)
  assert engine.runner.launches["layered_group_decode"] >= 15

  def difference(kv_scales):
    dense = load(checkpoint).dense()
    return GreedyOracle(dense, MAX_TOKENS, kind, kv_scales).first_difference(
      list(finished[name].prompt_token_ids),
      list(finished[name].token_ids),
      tolerance("float32", kind).greedy_tie,
    )

  assert not difference(scales)
  assert difference(scales[::-1])
  assert engine.num_unproved_rows == 0
