import dataclasses
import math

import pytest

from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.scheduler.lease_messages import (
  Commit,
  CommitReply,
  Fetch,
  FetchedEntry,
  Grant,
  HostedEntry,
  Introduction,
  Release,
  ReleaseReply,
  Renew,
  Reserve,
  ReserveReply,
  SlotName,
  Sync,
  SyncReply,
)
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  Candidates,
  ClusterStatus,
  Envelope,
  MoveKvcache,
  RecallKvcache,
)
from infinite_llm.scheduler.screening import (
  MAX_EPOCHS_MISSED,
  Group,
  fault_in,
  fault_in_answer,
)
from tests.scheduler.fake_cluster import BLOCK_SIZE, FakeCluster

_SLOT = SlotName(slot=0, epoch=1)
_RESERVE = Reserve(uid=1, slot=_SLOT, num_blocks=1)
_GROUP = Group(instance=1, num_instances=3, num_blocks=9, spill_slots=2)


def _grant(block_id, epoch=1):
  return Grant(block_id=block_id, epoch=epoch)


def _entry(logical_id, block_id):
  return HostedEntry(logical_id=logical_id, grant=_grant(block_id))


def _fetched(logical_id, block_id, home):
  return FetchedEntry(
    logical_id=logical_id, grant=_grant(block_id), home=_grant(home)
  )


def _move(num_blocks, dst=0):
  return MoveKvcache(uid=7, num_blocks=num_blocks, dst=dst)


def _recall(freeze_s):
  return RecallKvcache(uid=7, num_blocks=1, src=0, freeze_s=freeze_s)


def _fault(body, group=_GROUP, **change):
  """What instance 1 of three, with eight rBlocks each, says to a message."""
  fields = {"sender": 0, "receiver": 1, "incarnation": 1, "seq": 1, **change}
  return fault_in(Envelope(body=body, **fields), group, leader_epoch=7)


@pytest.mark.parametrize(
  ("body", "change"),
  [
    (_RESERVE, {}),
    (Renew(sent_s=0.0), {}),
    (ReserveReply(grants=()), {"responder": 1}),
    (Introduction(), {"responder": 2}),
    (
      Candidates(
        rooms=(
          (0, 1),
          (2, 1),
        )
      ),
      {"sender": GMANAGER},
    ),
    (ClusterStatus(lendable=1), {"sender": GMANAGER}),
  ],
)
def test_messages_that_make_sense_pass(body, change):
  assert _fault(body, **change) is None


def test_a_request_may_have_rblocks_in_host_memory_too():
  """Their numbers are counted, whoever hosts the others."""
  group = dataclasses.replace(_GROUP, host_blocks=6)
  commits = [
    Commit(uid=1, slot=_SLOT, entries=(_entry(n, 1),)) for n in (29, 30)
  ]
  faults = [_fault(commit, group) for commit in commits]
  assert faults == [None, "logical_id must be in [0, 29]; got 30."]


@pytest.mark.parametrize(
  ("body", "change", "fault"),
  [
    (_RESERVE, {"receiver": 2}, "receiver must be 1; got 2."),
    (_RESERVE, {"sender": 1}, "sender must be another instance in [0, 3); g"),
    (_RESERVE, {"sender": 3}, "sender must be another instance in [0, 3); g"),
    (_RESERVE, {"sender": -1}, "sender must be another instance in [0, 3); g"),
    (_RESERVE, {"sender": GMANAGER}, "a Reserve must not come from 'gmanager'"),
    (Candidates(rooms=()), {}, "a Candidates must not come from 0"),
    (
      ClusterStatus(lendable=1),
      {"sender": STANDBY},
      "a ClusterStatus must",
    ),
    (_move(0), {"sender": GMANAGER}, "num_blocks must be in [1, 8]; got 0."),
    (_move(9), {"sender": GMANAGER}, "num_blocks must be in [1, 8]; got 9."),
    (
      ClusterStatus(lendable=1),
      {"sender": GMANAGER, "leader_epoch": 7 + MAX_EPOCHS_MISSED + 1},
      f"leader_epoch must be in [0, {7 + MAX_EPOCHS_MISSED}]; got ",
    ),
    (_RESERVE, {"leader_epoch": 7}, "leader_epoch must be 0 in what an inst"),
    (_RESERVE, {"settled": 2}, "settled must be at most 1; got 2."),
    (
      ClusterStatus(lendable=17),
      {"sender": GMANAGER},
      "lendable must be in [0",
    ),
    (
      Candidates(
        rooms=(
          (0, 1),
          (0, 1),
        )
      ),
      {"sender": GMANAGER},
      "rooms must be of at",
    ),
    (_move(1, dst=1), {"sender": GMANAGER}, "a plan must name another instanc"),
    (_move(1, dst=3), {"sender": GMANAGER}, "a plan must name another instanc"),
    (_recall(-1.0), {"sender": GMANAGER}, "freeze_s must not be negative; go"),
    (_recall(math.nan), {"sender": GMANAGER}, "freeze_s must not be negative"),
    (_RESERVE, {"seq": 0}, "incarnation and seq must be at least 1; got 1 and"),
    (_RESERVE, {"incarnation": 0}, "incarnation and seq must be at least 1"),
    (_RESERVE, {"settled": -1}, "settled, meant_for and responder must not"),
    (_RESERVE, {"responder": 1}, "responder must be set in answers alone; got"),
    (Introduction(), {}, "responder must be set in answers alone; got 0"),
    (Candidates(rooms=((1, 1),)), {"sender": GMANAGER}, "rooms must be of oth"),
    (Candidates(rooms=((3, 1),)), {"sender": GMANAGER}, "rooms must be of oth"),
    (
      Candidates(rooms=((0, 0),)),
      {"sender": GMANAGER},
      "room must be in [1, 8",
    ),
    (
      Candidates(rooms=((0, 9),)),
      {"sender": GMANAGER},
      "room must be in [1, 8",
    ),
    (ClusterStatus(lendable=-1), {"sender": GMANAGER}, "lendable must"),
    (
      ClusterStatus(lendable=1, allotted_to=-7),
      {"sender": GMANAGER},
      "allotted_to must be in [0, 9223372036854775807]; got -7.",
    ),
  ],
)
def test_who_says_what_to_whom_is_checked(body, change, fault):
  assert _fault(body, **change).startswith(fault)


@pytest.mark.parametrize(
  ("body", "fault"),
  [
    (
      Reserve(uid=1, slot=_SLOT, num_blocks=-3),
      "num_blocks must be in [1, 8]; got -3.",
    ),
    (
      Reserve(uid=1, slot=_SLOT, num_blocks=2**62),
      "num_blocks must be in [1, 8]; got 4611686018427387904.",
    ),
    (
      Reserve(uid=0, slot=_SLOT, num_blocks=1),
      "uid must be in [1, 4294967295]; got 0.",
    ),
    (
      Commit(uid=1, slot=SlotName(slot=2, epoch=1), entries=(_entry(0, 1),)),
      "slot must be in [0, 1]; got 2.",
    ),
    (
      Commit(uid=1, slot=_SLOT, entries=(_entry(24, 1),)),
      "logical_id must be in [0, 23]; got 24.",
    ),
    (
      Sync(uid=1, slot=_SLOT, entries=(_entry(0, 9),)),
      "block_id must be in [1, 8]; got 9.",
    ),
    (
      Fetch(uid=1, slot=_SLOT, entries=(_fetched(0, 1, 9),)),
      "block_id must be in [1, 8]; got 9.",
    ),
    (
      Release(slot=_SLOT, grants=(_grant(1, epoch=2**32),)),
      "the epoch of a grant must be in [1, 4294967295]; got 4294967296.",
    ),
    (
      Renew(sent_s=math.nan),
      "sent_s must be finite; got nan.",
    ),
    (
      Release(slot=SlotName(slot=0, epoch=0), grants=(_grant(1),)),
      "the slot's epoch must be in [1, 4294967295]; got 0.",
    ),
    (Sync(uid=1, slot=_SLOT, entries=()), "entries must not be empty; got ()."),
    (
      Sync(uid=1, slot=_SLOT, entries=(_entry(0, 1), _entry(0, 2))),
      "each logical_id must be named once; got [0, 0].",
    ),
    (
      Commit(uid=1, slot=_SLOT, entries=(_entry(0, 1), _entry(1, 1))),
      "each block_id must be named once; got [1, 1].",
    ),
    (
      Commit(uid=1, slot=_SLOT, entries=(_entry(-1, 1),)),
      "logical_id must be in [0, 23]; got -1.",
    ),
    (
      Fetch(uid=1, slot=_SLOT, entries=(_fetched(0, 1, 5), _fetched(1, 2, 5))),
      "each block_id must be named once; got [5, 5].",
    ),
    (
      Release(slot=_SLOT, grants=(_grant(1), _grant(1))),
      "each block_id must be named once; got [1, 1].",
    ),
  ],
)
def test_what_a_debtor_asks_is_checked(body, fault):
  assert _fault(body).startswith(fault)


@pytest.mark.parametrize(
  ("body", "fault"),
  [
    (
      ReserveReply(grants=(_grant(4), _grant(4, epoch=2))),
      "each block_id must be named once; got [4, 4].",
    ),
    (
      ReserveReply(grants=(_grant(9),)),
      "block_id must be in [1, 8]; got 9.",
    ),
    (
      CommitReply(table_version=-1),
      "table_version must be in [0, 2147483647]; got -1.",
    ),
    (
      CommitReply(table_version=2**31),
      "table_version must be in [0, 2147483647]; got 2147483648.",
    ),
  ],
)
def test_what_a_creditor_answers_is_checked(body, fault):
  assert _fault(body, responder=1) == fault


@pytest.mark.parametrize(
  ("request_", "reply", "fault"),
  [
    (
      _RESERVE,
      CommitReply(table_version=0),
      "the answer to a Reserve must be a ReserveReply; got a CommitReply.",
    ),
    (
      _RESERVE,
      ReserveReply(grants=(_grant(1), _grant(2))),
      "grants must be at most 1; got 2.",
    ),
    (
      Sync(uid=1, slot=_SLOT, entries=(_entry(3, 1),)),
      SyncReply(table_version=None, missing=(4,)),
      "missing must be some of the synced rBlocks if and only if there is no"
      " table_version; got (4,) and None.",
    ),
    (
      Sync(uid=1, slot=_SLOT, entries=(_entry(3, 1),)),
      SyncReply(table_version=None, missing=()),
      "missing must be some of the synced rBlocks if and only if there is no"
      " table_version; got () and None.",
    ),
  ],
)
def test_an_answer_must_belong_to_what_was_asked(request_, reply, fault):
  assert fault_in_answer(request_, reply) == fault


def test_answers_that_fit_pass():
  sync = Sync(uid=1, slot=_SLOT, entries=(_entry(3, 1),))
  for request, reply in (
    (_RESERVE, ReserveReply(grants=(_grant(1),))),
    (sync, SyncReply(table_version=0, missing=())),
    (sync, SyncReply(table_version=None, missing=(3,))),
  ):
    assert fault_in_answer(request, reply) is None


class TestRefusal:
  def _lent(self):
    """Instance 0 has two rBlocks of request 7 at instance 1."""
    cluster = FakeCluster(3, 9)
    cluster.introduce()
    cluster.heartbeat()
    cluster.open(0, 7, 4 * BLOCK_SIZE)
    assert cluster.managers[0].borrow(7, 2)
    cluster.settle()
    return cluster

  @pytest.mark.parametrize(
    "body",
    [
      Release(slot=_SLOT, grants=(_grant(1),)),
      Commit(uid=7, slot=_SLOT, entries=(_entry(0, 1),)),
      Sync(uid=7, slot=_SLOT, entries=(_entry(0, 1),)),
      Fetch(uid=7, slot=_SLOT, entries=(_fetched(0, 1, 1),)),
    ],
  )
  def test_nobody_can_use_the_leases_of_another(self, body):
    cluster = self._lent()
    creditor = cluster.managers[1]
    creditor.on_message(
      Envelope(
        sender=2, receiver=1, incarnation=1, seq=9, body=body, meant_for=1
      )
    )

    assert creditor.refused == {type(body).__name__: 1}
    assert creditor.lent() == {0: 2}
    assert creditor.drain_messages() == creditor.drain_effects() == []

  @pytest.mark.parametrize(
    "body",
    [
      Release(slot=_SLOT, grants=(_grant(1, epoch=3),)),
      Commit(
        uid=7,
        slot=_SLOT,
        entries=(HostedEntry(logical_id=0, grant=_grant(8, epoch=2**31)),),
      ),
    ],
  )
  def test_a_lease_that_was_never_granted_is_refused(self, body):
    cluster = self._lent()  # Its leases have the epochs 1 and 2.
    creditor = cluster.managers[1]
    creditor.on_message(
      Envelope(
        sender=0, receiver=1, incarnation=1, seq=99, body=body, meant_for=1
      )
    )

    assert creditor.refused == {type(body).__name__: 1}
    assert creditor.lent() == {0: 2}
    assert creditor.drain_messages() == creditor.drain_effects() == []

  @pytest.mark.parametrize("epoch", [1, 3])
  def test_no_lease_is_granted_twice_but_an_rblock_may_be(self, epoch):
    cluster = self._lent()
    owner = cluster.managers[0]
    cluster.open(0, 8, 2 * BLOCK_SIZE)
    assert owner.move_kvcache(8, 1, 1)
    (asked,) = owner.drain_messages()
    owner.on_message(
      Envelope(
        sender=1,
        receiver=0,
        incarnation=1,
        seq=asked.seq,
        body=ReserveReply(grants=(_grant(1, epoch=epoch),)),
        responder=1,
      )
    )

    # Epoch 3 says that the creditor has ended the lease with epoch 1.
    is_twice = epoch == 1
    assert owner.refused == ({"ReserveReply": 1} if is_twice else {})
    assert owner.borrowed() == {1: 2 if is_twice else 3}

  def test_a_renewal_of_the_future_is_refused(self):
    cluster = self._lent()
    owner = cluster.managers[0]
    spoiled = []

    def spoil(envelope):
      if isinstance(envelope.body, Renew):
        body = Renew(sent_s=cluster.now_s + 1000.0)
        spoiled.append(body)
        return [dataclasses.replace(envelope, body=body)]
      return [envelope]

    cluster.transport = InProcessTransport(spoil)
    for address, manager in (
      *enumerate(cluster.managers),
      (GMANAGER, cluster.gmanager),
    ):
      cluster.transport.register(address, manager.on_message)
    cluster.tick()
    cluster.settle()

    assert len(spoiled) == 1
    assert owner.refused == {"Renewed": 1}

  def test_an_unfitting_answer_is_refused_and_the_right_one_still_counts(self):
    cluster = FakeCluster(2, 9)
    cluster.introduce()
    cluster.heartbeat()
    cluster.open(0, 7, 4 * BLOCK_SIZE)
    owner = cluster.managers[0]
    owner.drain_messages()
    assert owner.borrow(7, 2)
    (asked,) = owner.drain_messages()
    owner.on_message(
      Envelope(
        sender=GMANAGER,
        receiver=0,
        incarnation=1,
        seq=asked.seq,
        body=ReleaseReply(table_version=0),
      )
    )
    assert owner.refused == {"ReleaseReply": 1}
    cluster.tick()
    cluster.settle()

    assert owner.borrowed() == {1: 2}
