import random

import pytest

from infinite_llm.errors import ConfigError
from tests.simulator.simulated_clusters import (
  make_cost,
  make_request,
  make_simulator,
)

ALL = ("borrow", "greedy", "static", "swap", "migrate")


def _mixed_trace(seed, num_requests=12):
  """Short and long requests for pools of 32 tokens; none is above 30."""
  rng = random.Random(seed)
  arrivals = sorted(rng.uniform(0, 5) for _ in range(num_requests))
  return [
    make_request(rng.choice((3, 9, 20)), rng.randint(1, 10), arrival_s)
    for arrival_s in arrivals
  ]


def _times(result):
  return [(r.first_token_s, r.finish_s) for r in result.records]


def test_steps_take_exactly_what_their_rows_do():
  # Instance 0 gets requests 0 and 2, as the first of two equal ones.
  #   0.0 .. 1.246: prompts of 8 and 4: 12 x 0.1 + (36 + 10 pairs) x 0.001
  #   1.246 .. 1.436: request 0 decodes: 0.1 + 9 tokens x 0.01
  # Instance 1 has request 1 alone.
  #   0.0 .. 0.836: a prompt of 8: 8 x 0.1 + 36 x 0.001
  #   0.836 .. 1.026 and .. 1.226: 9 tokens, then 10
  requests = [make_request(8, 2), make_request(8, 3), make_request(4, 1)]

  result = make_simulator(requests, policy="static").run()

  assert _times(result) == [
    (pytest.approx(1.246), pytest.approx(1.436)),
    (pytest.approx(0.836), pytest.approx(1.226)),
    (pytest.approx(1.246), pytest.approx(1.246)),
  ]
  assert result.instance_steps == 5
  assert result.duration_s == pytest.approx(1.436)


def test_who_arrives_enters_with_the_next_step():
  # Of one row and n tokens a step takes 0.1 + 0.01 n, a prompt of 4 0.41.
  #   0.0 .. 0.836: request 0's prompt of 8
  #   0.836 .. 1.026 .. 1.226: it decodes, at 9 and 10 tokens
  #   1.1: request 1 arrives
  #   1.226 .. 1.846: the step after: 0.1 + 0.11, and the prompt's 0.41
  #   1.846 .. 2.216: both: 0.2 + 0.12 + 0.05
  requests = [make_request(8, 5), make_request(4, 2, arrival_s=1.1)]

  result = make_simulator(requests, policy="static", num_instances=1).run()

  assert _times(result) == [
    (pytest.approx(0.836), pytest.approx(2.216)),
    (pytest.approx(1.846), pytest.approx(2.216)),
  ]


def test_no_rblock_is_taken_ahead_of_need():
  # In a pool of 4, request 0 has 1 until its ninth token needs another; so
  # there are 3 for request 1, which is over by then.
  #   0.0 .. 0.515 .. 0.675: request 0's prompt of 5, and one token at 6
  #   0.675 .. 2.581: 0.1 + 0.07, and 16 of request 1's tokens: 1.6 + 0.136
  #   2.581 .. 3.031: one token each: 0.2 + 0.08 + 0.17
  requests = [make_request(5, 9), make_request(17, 1, arrival_s=0.6)]

  result = make_simulator(requests, policy="static", num_instances=1).run()

  assert result.records[1].finish_s == pytest.approx(3.031)
  assert result.num_preempted == 0


def test_only_sharing_serves_what_no_pool_holds():
  requests = [make_request(38, 4)]  # 42 tokens, for pools of 32

  refused = make_simulator(requests, policy="static").run()
  served = make_simulator(requests, policy="borrow").run()

  assert "42 tokens" in refused.records[0].refused
  assert refused.finished() == []
  assert [record.num_tokens for record in served.finished()] == [42]
  assert served.num_blocks_moved > 0
  assert served.remote_share > 0


def test_a_step_that_others_read_for_takes_the_slowest_and_the_exchange():
  simulator = make_simulator([make_request(38, 2)])
  owner, creditor = (instance.manager for instance in simulator.instances)
  (record,) = simulator.records
  while record.first_token_s is None:
    simulator.network.step()
  hosted_tokens = 8 * owner.table(1).num_at(1)
  assert hosted_tokens == 8 * creditor.counts().hosted == 32

  simulator.run()

  # 39 tokens are attended: 32 by the creditor, who is slower than the owner.
  assert record.finish_s - record.first_token_s == pytest.approx(
    0.1 + 0.32 + 0.5
  )


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_rblocks_add_up_after_every_event(policy, seed):
  simulator = make_simulator(
    _mixed_trace(seed),
    policy=policy,
    num_instances=3,
  )
  while not simulator.is_over:
    simulator.network.step()
    simulator.check()

  result = simulator.run()

  assert len(result.finished()) == 12
  assert result.num_blocks_leaked == 0


@pytest.mark.parametrize("policy", ALL)
def test_equal_seeds_give_equal_runs(policy):
  def run(seed):
    simulator = make_simulator(
      [make_request(38, 4), *_mixed_trace(0)], policy=policy, seed=seed
    )
    return simulator.run()

  assert run(1) == run(1)


def test_other_seeds_delay_messages_otherwise():
  def run(seed):
    return make_simulator([make_request(38, 4)], seed=seed).run()

  assert _times(run(1)) != _times(run(2))


def test_swapped_requests_come_back_by_a_copy():
  # Two requests of 24 tokens in the end, in one pool of 32.
  requests = [make_request(12, 12), make_request(13, 11)]

  def run(policy):
    return make_simulator(
      requests, policy=policy, num_instances=1, host_blocks=5
    ).run()

  computed, copied = run("static"), run("swap")

  assert computed.num_preempted == copied.num_preempted == 1
  assert computed.num_blocks_swapped == 0
  assert copied.num_blocks_swapped == 4
  assert copied.num_blocks_leaked == 0
  # The second request goes with 16 of its 17 tokens computed, and the first one
  # waits until these 2 rBlocks are copied. Later the other one comes back:
  #   computed: 16 x 0.1 + 136 pairs x 0.001
  #   copied: 16 x 0.001
  (_, alone_s), (_, computed_s) = _times(computed)
  (_, delayed_s), (_, copied_s) = _times(copied)
  assert delayed_s - alone_s == pytest.approx(0.016)
  assert computed_s - copied_s == pytest.approx(1.736 - 2 * 0.016)


def test_a_host_tier_that_is_full_takes_nothing():
  requests = [make_request(12, 12), make_request(13, 11)]

  def run(host_blocks):
    return make_simulator(
      requests, policy="swap", num_instances=1, host_blocks=host_blocks
    ).run()

  assert run(2).num_blocks_swapped == 0
  assert run(3).num_blocks_swapped == 4


def test_requests_migrate_to_where_there_is_room():
  # 8 rBlocks each. The first request comes to 4 and the third needs 5 beside
  # it; the second one, elsewhere, has 1 to begin with.
  requests = [make_request(26, 6), make_request(3, 29), make_request(34, 3)]

  def run(policy):
    return make_simulator(requests, policy=policy, num_blocks=9).run()

  stayed, migrated = run("static"), run("migrate")

  assert stayed.num_migrated == 0
  assert migrated.num_migrated == 1
  assert len(migrated.finished()) == 3
  assert migrated.num_blocks_leaked == 0
  assert migrated.records[2].finish_s < stayed.records[2].finish_s


def test_circles_are_dissolved_unless_asked_not_to():
  # Three instances of 64 tokens; every other request outgrows its own.
  requests = [make_request(38 if number % 2 else 58, 12) for number in range(6)]

  def run(*, has_dgfm):
    return make_simulator(
      requests, num_instances=3, num_blocks=9, has_dgfm=has_dgfm
    ).run()

  assert run(has_dgfm=True).num_blocks_recalled > 0
  assert run(has_dgfm=False).num_blocks_recalled == 0


def test_a_run_ends_when_its_time_is_up():
  result = make_simulator([make_request(8, 20)], most_s=1.0).run()

  assert result.finished() == []
  assert result.records[0].first_token_s == pytest.approx(0.836)
  assert 1.0 <= result.duration_s < 1.2


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("num_instances", 0),
    ("num_blocks", 1),
    ("host_blocks", 1),
    ("most_s", 0),
  ],
)
def test_impossible_clusters_are_refused(name, value):
  with pytest.raises(ConfigError, match=name):
    make_simulator([make_request(8, 2)], policy="swap", **{name: value})


def test_steps_take_longer_with_overhead():
  requests = [make_request(8, 2)]
  cost = make_cost(step_overhead_s=1.0)

  result = make_simulator(requests, policy="static", cost=cost).run()

  assert _times(result) == [(pytest.approx(1.836), pytest.approx(3.026))]
