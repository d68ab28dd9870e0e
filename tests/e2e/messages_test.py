"""Messages may be lost, repeated, late and out of order: nothing goes wrong."""

import collections

import numpy as np
import pytest

from infinite_llm.scheduler import messages
from tests.e2e.rig import LONG, WORKLOAD, Ask, right_answers

OWNER = WORKLOAD[LONG].instance
KINDS = [
  messages.Heartbeat,
  messages.ClusterStatus,
  messages.CandidatesRequest,
  messages.Candidates,
  messages.Reserve,
  messages.ReserveReply,
  messages.Commit,
  messages.CommitReply,
  messages.Release,
  messages.ReleaseReply,
  messages.Sync,
  messages.SyncReply,
  messages.Renew,
  messages.Renewed,
]


def run(rig, before_step=lambda: None):
  """Runs the workload; all must end right and leave nothing behind."""
  rig.expected = right_answers()
  rig.add(WORKLOAD)
  outputs = rig.drain(before_step)
  for name, right in right_answers().items():
    assert outputs[name].token_ids == right, (name, outputs[name].error)
  rig.finish()


def make_tables_stale(rig, monkeypatch):
  """Every third group program finds old tables, so that syncs are needed."""
  group_step = rig.engine.runner.group_step
  calls = []

  def disturbed(rows, slots, **options):
    calls.append(len(calls))
    if rows[OWNER] and len(calls) % 3 == 0:
      for instance, uploads in enumerate(rig.uploads):
        rig.engine.runner.set_hosted(instance, uploads[0])
    return group_step(rows, slots, **options)

  monkeypatch.setattr(rig.engine.runner, "group_step", disturbed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("fault", ["lost", "repeated", "late"])
def test_every_kind_of_message_may_fail(rig, monkeypatch, kind, fault):
  hits = collections.defaultdict(list)

  def rule(envelope):
    if not isinstance(envelope.body, kind):
      return (envelope,)
    hit = hits[envelope.sender, envelope.receiver]
    hit.append(envelope)
    match fault:
      case "lost":  # Each other one, so that what is sent again arrives.
        return () if len(hit) % 2 else (envelope,)
      case "repeated":  # At once, and again when the next one is sent.
        return (envelope, envelope, *hit[-2:-1])
      case "late":  # Each other one waits for the next, and comes after it.
        return () if len(hit) % 2 else (envelope, hit[-2])

  if kind in (messages.Sync, messages.SyncReply):
    make_tables_stale(rig, monkeypatch)
  rig.mail.rule = rule
  run(rig)
  assert hits
  if kind not in (messages.Sync, messages.SyncReply):
    assert not rig.failed_rows
    assert not rig.preempted


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_faults_is_survived(rig, monkeypatch, seed):
  rng = np.random.default_rng(seed)
  happened = collections.Counter()

  def rule(envelope):
    fault = rng.choice(
      ["none", "lost", "repeated", "late"], p=[0.4, 0.2, 0.2, 0.2]
    )
    happened[fault] += 1
    late = []
    if rng.random() < 0.3:
      late, rig.mail.held = rig.mail.held, []
      rng.shuffle(late)
    match fault:
      case "none":
        return (envelope, *late)
      case "lost":
        return late
      case "repeated":
        rig.mail.hold(envelope)
        return (envelope, *late)
      case "late":
        rig.mail.hold(envelope)
        return late

  make_tables_stale(rig, monkeypatch)
  rig.mail.rule = rule
  run(rig)
  assert min(happened.values()) > 10


def test_a_lost_release_is_sent_again(rig):
  lost = []

  def rule(envelope):
    if isinstance(envelope.body, messages.Release) and len(lost) < 2:
      lost.append(envelope)
      return ()
    return (envelope,)

  rig.mail.rule = rule
  run(rig)  # Only a Release that arrives makes its rBlocks free.
  assert lost


def test_no_rblock_is_used_again_while_its_release_is_not_confirmed(rig):
  """Books change when it is acknowledged: by the creditor, then the owner."""
  replies = []

  def rule(envelope):
    if isinstance(envelope.body, messages.Release):
      return ()
    if isinstance(envelope.body, messages.ReleaseReply):
      replies.append(envelope)
    return (envelope,)

  rig.mail.rule = rule
  rig.expected = right_answers()
  rig.add(WORKLOAD)
  rig.drain()
  for _ in range(50):  # Time enough to send it again, in vain.
    rig.engine.settle()
  managers = rig.engine.group.managers
  counts = rig.engine.pool_counts()
  owed = sum(managers[OWNER].borrowed().values())
  assert owed > 0
  assert sum(manager.lent().get(OWNER, 0) for manager in managers) == owed
  assert sum(count.hosted for count in counts) >= owed
  assert managers[OWNER].num_free_slots == 1
  # Life goes on beside it, in what is left.
  rig.add({name: WORKLOAD[name] for name in ("short-2", "short-3")})
  outputs = rig.drain()
  for name in ("short-2", "short-3"):
    assert outputs[name].token_ids == right_answers()[name]
  assert not replies
  assert not rig.failed_rows
  rig.finish()


def test_messages_of_a_past_request_do_not_touch_the_next_one(rig):
  """All that was ever sent comes again, in the middle of another run."""
  past = []

  def record(envelope):
    past.append(envelope)
    return (envelope,)

  rig.mail.rule = record
  run(rig)
  rig.mail.rule = lambda envelope: (envelope,)
  old = tuple(past)

  def repeat():
    for envelope in old:
      rig.engine.group.transport.send(envelope)

  run(rig, repeat)
  assert len(old) > 30
  assert not rig.failed_rows
  assert not rig.preempted


def test_a_short_request_waits_for_no_message(rig):
  """An instance whose messages are all lost still serves what fits in it."""
  rig.mail.rule = lambda envelope: ()
  rig.add({"short-2": WORKLOAD["short-2"], "alone": Ask(100, 4, 0)})
  rig.expected = right_answers()
  outputs = rig.drain(max_steps=40)
  assert outputs["short-2"].token_ids == right_answers()["short-2"]
  assert outputs["alone"].finish_reason == "length"
  rig.finish()
