import dataclasses

import pytest

from infinite_llm.scheduler.gmanager_screening import fault_in
from infinite_llm.scheduler.lease_messages import Renew
from infinite_llm.scheduler.messages import (
  GMANAGER,
  STANDBY,
  CandidatesRequest,
  Envelope,
  Heartbeat,
  Leadership,
  RequestBlocks,
)
from infinite_llm.scheduler.screening import MAX_EPOCHS_MISSED
from infinite_llm.types import PoolCounts

# Ten rBlocks: three are of its own requests, three are lent, one is promised to
# somebody, three are free.
_COUNTS = PoolCounts(used=3, free=3, hosted=3, reserved=1, total=10)
_HEARTBEAT = Heartbeat(
  counts=_COUNTS,
  lendable=2,
  num_running=1,
  num_waiting=1,
  next_blocks=5,
  lent=((1, 2), (2, 2)),
  requests=(RequestBlocks(uid=7, holders=((0, 3), (2, 1)), movable=2),),
  leader_epoch=7,
)
_MOST = {
  "next_blocks": 30,
  "next_arrival": 2**63 - 1,
  "promised": 30,
  "local_blocks": 10,
}
_CHANGE = dataclasses.replace(_HEARTBEAT, base=8, lent=((1, 0),))


def _fault(body, **change):
  """What a gManager of three instances says to the ninth of instance 0."""
  fields = {"sender": 0, "receiver": GMANAGER, "incarnation": 1, "seq": 9}
  return fault_in(
    Envelope(body=body, **fields | change),
    address=GMANAGER,
    peers=(STANDBY,),
    num_instances=3,
    leader_epoch=7,
  )


def _request(**fields):
  return (RequestBlocks(**{"uid": 7, "holders": ((0, 3),)} | fields),)


@pytest.mark.parametrize(
  ("body", "change"),
  [
    (_HEARTBEAT, {}),
    (_CHANGE, {}),
    (dataclasses.replace(_HEARTBEAT, **_MOST), {}),
    (dataclasses.replace(_CHANGE, requests=_request(holders=())), {}),
    (CandidatesRequest(num_blocks=1), {}),
    (Leadership(), {"sender": STANDBY, "leader_epoch": 9}),
  ],
)
def test_messages_that_make_sense_pass(body, change):
  assert _fault(body, **change) is None


@pytest.mark.parametrize(
  ("body", "change", "fault"),
  [
    (_HEARTBEAT, {"receiver": STANDBY}, "receiver must be 'gmanager'; got 's"),
    (_HEARTBEAT, {"sender": 3}, "sender must be in [0, 3); got 3."),
    (_HEARTBEAT, {"sender": -1}, "sender must be in [0, 3); got -1."),
    (_HEARTBEAT, {"sender": STANDBY}, "a Heartbeat must not come from 'standb"),
    (_HEARTBEAT, {"sender": "me"}, "sender must be an instance or a peer; got"),
    (_HEARTBEAT, {"incarnation": 0}, "incarnation and seq must be at least 1"),
    (_HEARTBEAT, {"leader_epoch": 7}, "leader_epoch must be 0 in what an inst"),
    (Leadership(), {}, "a Leadership is not for a gManager."),
    (Leadership(), {"sender": GMANAGER}, "sender must be an instance or a pee"),
    (
      Leadership(),
      {"sender": STANDBY, "leader_epoch": 7 + MAX_EPOCHS_MISSED + 1},
      f"leader_epoch must be in [0, {7 + MAX_EPOCHS_MISSED}]; got",
    ),
    (Renew(sent_s=0.0), {}, "a Renew is not for a gManager."),
    (CandidatesRequest(num_blocks=0), {}, "num_blocks must be in [1, 21474836"),
    (CandidatesRequest(num_blocks=2**31), {}, "num_blocks must be in [1, 2147"),
  ],
)
def test_who_says_what_is_checked(body, change, fault):
  assert _fault(body, **change).startswith(fault)


@pytest.mark.parametrize(
  ("change", "fault"),
  [
    ({"lendable": -1}, "numbers must be in [0, 2147483647]; got (3, 3, 3, 1,"),
    ({"num_waiting": 2**31}, "numbers must be in [0, 2147483647]; got"),
    (
      {"counts": dataclasses.replace(_COUNTS, free=4)},
      "counts must add up to a total of at least 1; got",
    ),
    ({"lendable": 4}, "lendable must be at most 3; got 4."),
    ({"num_waiting": 0}, "next_blocks must be at most 30, and 0 if nobody wa"),
    (
      {"next_blocks": 31},
      "next_blocks must be at most 30, and 0 if nobody wa",
    ),
    ({"promised": -1}, "numbers must be in [0, 2147483647]; got (3, 3, 3, 1,"),
    ({"promised": 2**62}, "numbers must be in [0, 2147483647]; got (3, 3, 3,"),
    (
      {"promised": 31},
      "promised must be at most 30 for each of 1 requests; g",
    ),
    ({"local_blocks": -1}, "numbers must be in [0, 2147483647]; got (3, 3, 3,"),
    ({"local_blocks": 11}, "local_blocks must be at most 10; got 11."),
    ({"next_arrival": -1}, "next_arrival must be in [0, 9223372036854775807]"),
    ({"next_arrival": 2**63}, "next_arrival must be in [0, 92233720368547758"),
    (
      {"num_waiting": 0, "next_blocks": 0, "next_arrival": 1},
      "next_arrival must be in [0, 9223372036854775807], and 0 if nobody waits",
    ),
    ({"lent": ((1, 2),)}, "lent must add up to [3, 4], as hosted and reserved"),
    ({"lent": ((1, 5),)}, "lent must add up to [3, 4], as hosted and reserved"),
    ({"lent": ((0, 3),)}, "lent must name others; got 0 itself."),
    ({"lent": ((3, 3),)}, "lent must name instances in [0, 3); got 3."),
    ({"lent": ((1, -3),)}, "lent must have [1, 2147483647] rBlocks; got -3."),
    ({"lent": ((1, 0), (2, 3))}, "lent must have [1, 2147483647] rBlocks; got"),
    ({"lent": ((1, 2), (1, 2))}, "lent must name each instance once; got 2 of"),
    ({"base": 9}, "base must be None or in [1, 9); got 9."),
    ({"base": -1}, "base must be None or in [1, 9); got -1."),
    ({"leader_epoch": 2**32 - 1}, "leader_epoch must be in [0,"),
    ({"leader_epoch": -1}, "leader_epoch must be in [0,"),
  ],
)
def test_a_heartbeat_that_contradicts_itself_is_refused(change, fault):
  assert _fault(dataclasses.replace(_HEARTBEAT, **change)).startswith(fault)


@pytest.mark.parametrize(
  ("requests", "fault"),
  [
    (_request(uid=0), "request 0 must have a uid in [1, 2**32); got 0."),
    (_request(holders=()), "request 7 must have rBlocks; got none."),
    (_request(holders=((3, 1),)), "request 7 must name instances in [0, 3); g"),
    (_request(holders=((1, 0),)), "request 7 must have [1, 2147483647] rBlock"),
    (_request(movable=4), "request 7 must have movable in [0, 3]; got 4."),
    (_request(movable=-1), "request 7 must have movable in [0, 3]; got -1."),
    (_request() * 2, "each uid must be named once; got 2 of them."),
    (_request() + _request(uid=8), "requests must be at most 1; got 2."),
    (
      _request(holders=((0, 5),)),
      "requests must have at most 4 rBlocks at home; got 5.",
    ),
  ],
)
def test_requests_of_a_heartbeat_must_fit_its_counts(requests, fault):
  heartbeat = dataclasses.replace(_HEARTBEAT, requests=requests)
  assert _fault(heartbeat).startswith(fault)


def test_a_gmanager_of_no_fixed_group_hears_any_instance():
  envelope = Envelope(
    sender=2**31 - 1,
    receiver=GMANAGER,
    incarnation=1,
    seq=9,
    body=CandidatesRequest(num_blocks=1),
  )
  options = {"address": GMANAGER, "peers": (), "leader_epoch": 0}
  assert fault_in(envelope, num_instances=None, **options) is None
  assert fault_in(envelope, num_instances=3, **options) is not None
