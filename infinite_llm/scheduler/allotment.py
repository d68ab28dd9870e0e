"""Which waiting requests may count on room elsewhere: one rule for all.

If each instance took the room of all others for its own, several would let
requests in on the strength of the same rBlocks, and preempt each other later.
So the gManager allots it, to one request of an instance at a time.
"""

from collections.abc import Iterable

from infinite_llm.scheduler.cluster_view import LedgerLine
from infinite_llm.types import InstanceId


def allot(lines: Iterable[LedgerLine]) -> dict[InstanceId, int]:
  """Decides who may come in on the strength of rBlocks to be borrowed.

  Only requests that their own instance cannot hold: others wait until those
  that run there end, which is soon, whereas a request with rBlocks elsewhere
  has instances wait for each other as long as it runs.

  What running requests are still to get comes first, for they cannot go on
  without. Those that wait follow as they came, whatever instance they wait on,
  and nobody overtakes: the longest would wait for ever if shorter ones took
  what becomes free, and two that came in by half would wait for each other.

  Args:
    lines: All instances, as of their last heartbeats.

  Returns:
    The arrival number of the first request that waits, for each instance that
    may let it in although it needs more than is free there.
  """
  lines = tuple(lines)
  short = [
    line
    for line in lines
    if line.next_blocks
    and line.next_blocks > max(line.own_room, line.own_capacity)
  ]
  if not short:  # As nearly always.
    return {}
  room = sum(line.lendable + min(line.own_room, 0) for line in lines)
  allotted: dict[InstanceId, int] = {}
  for line in sorted(
    short, key=lambda line: (line.next_arrival, line.instance)
  ):
    # It takes what its instance would lend, and the rest from others.
    room -= line.next_blocks - max(line.own_room, 0) + line.lendable
    if room < 0:
      break
    allotted[line.instance] = line.next_arrival
  return allotted
