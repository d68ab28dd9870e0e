"""Which messages a gManager refuses: those that no sane sender would send.

As `screening.py`, from the other end. What a heartbeat says must fit together:
the ledger and all plans are made of it.
"""

from collections.abc import Iterable, Sequence

from infinite_llm.scheduler.messages import (
  Address,
  BlocksOf,
  CandidatesRequest,
  Envelope,
  Heartbeat,
  Leadership,
  RequestBlocks,
)
from infinite_llm.scheduler.screening import (
  MOST_ARRIVAL,
  fault_in_leader_epoch,
  fault_in_numbers,
)
from infinite_llm.types import Epoch, InstanceId, PoolCounts

_MOST_BLOCKS = 2**31 - 1
"""More rBlocks than any pool has: block numbers are int32 on the devices."""

_MOST_INSTANCES = 2**31


def fault_in(
  envelope: Envelope,
  *,
  address: Address,
  peers: Sequence[Address],
  num_instances: int | None,
  leader_epoch: Epoch,
) -> str | None:
  """Says why a gManager refuses a message.

  Args:
    envelope: The message.
    address: The gManager's own.
    peers: The other gManagers.
    num_instances: I; None if it takes heartbeats of any instance.
    leader_epoch: Newest epoch of a leading gManager that it has heard of.

  Returns:
    What is wrong with it; None if nothing is.
  """
  sender, body = envelope.sender, envelope.body
  if envelope.receiver != address:
    return f"receiver must be {address!r}; got {envelope.receiver!r}."
  fault = fault_in_numbers(envelope)
  if fault is not None:
    return fault
  if not isinstance(sender, int):
    if sender not in peers:
      return f"sender must be an instance or a peer; got {sender!r}."
    if not isinstance(body, Leadership):
      return f"a {type(body).__name__} must not come from {sender!r}."
    return fault_in_leader_epoch(envelope.leader_epoch, leader_epoch)
  most = _MOST_INSTANCES if num_instances is None else num_instances
  if not 0 <= sender < most:
    return f"sender must be in [0, {most}); got {sender}."
  match body:
    case Heartbeat():
      return (
        fault_in_leader_epoch(body.leader_epoch, leader_epoch)
        or _fault_in_counts(body)
        or _fault_in_demand(body, most)
        or _fault_in_lent(sender, body, most)
        or _fault_in_requests(sender, body, most)
        or _fault_in_base(envelope.seq, body.base)
      )
    case CandidatesRequest(num_blocks=num_blocks):
      if not 1 <= num_blocks <= _MOST_BLOCKS:
        return f"num_blocks must be in [1, {_MOST_BLOCKS}]; got {num_blocks}."
      return None
    case _:
      return f"a {type(body).__name__} is not for a gManager."


def fault_in_debts(counts: PoolCounts, lent: Iterable[int]) -> str | None:
  """Says why rBlocks in use by others cannot be those that were lent to them.

  Args:
    counts: Use of a creditor's rBlocks.
    lent: How many it holds for each debtor, promised ones included.

  Returns:
    What is wrong; None if nothing is.
  """
  total = sum(lent)
  most = counts.hosted + counts.reserved
  if not counts.hosted <= total <= most:
    return (
      f"lent must add up to [{counts.hosted}, {most}], as hosted and reserved"
      f" rBlocks do; got {total}."
    )
  return None


def _fault_in_counts(said: Heartbeat) -> str | None:
  counts = said.counts
  numbers = (
    counts.used,
    counts.free,
    counts.hosted,
    counts.reserved,
    said.lendable,
    said.num_running,
    said.num_waiting,
    said.next_blocks,
    said.promised,
    said.local_blocks,
  )
  if not 0 <= min(numbers) <= max(numbers) <= _MOST_BLOCKS:
    return f"numbers must be in [0, {_MOST_BLOCKS}]; got {numbers}."
  if not counts.is_conserved() or counts.total < 1:
    return f"counts must add up to a total of at least 1; got {counts}."
  if said.lendable > counts.free:
    return f"lendable must be at most {counts.free}; got {said.lendable}."
  if said.local_blocks > counts.total:
    return (
      f"local_blocks must be at most {counts.total}; got {said.local_blocks}."
    )
  return None


def _fault_in_demand(said: Heartbeat, num_instances: int) -> str | None:
  """No request needs more than all pools have, and what waits is numbered."""
  most = said.counts.total * num_instances
  if said.next_blocks > (most if said.num_waiting else 0):
    return (
      f"next_blocks must be at most {most}, and 0 if nobody waits; got"
      f" {said.next_blocks} for {said.num_waiting}."
    )
  if said.promised > most * said.num_running:
    return (
      f"promised must be at most {most} for each of {said.num_running}"
      f" requests; got {said.promised}."
    )
  if not 0 <= said.next_arrival <= (MOST_ARRIVAL if said.num_waiting else 0):
    return (
      f"next_arrival must be in [0, {MOST_ARRIVAL}], and 0 if nobody waits;"
      f" got {said.next_arrival} for {said.num_waiting}."
    )
  return None


def _fault_in_lent(
  sender: InstanceId, said: Heartbeat, num_instances: int
) -> str | None:
  # A change names those to whom nothing is lent any more.
  if said.lent:
    fault = _fault_in_blocks(said.lent, num_instances, 1 - said.is_change)
    if fault is not None:
      return f"lent {fault}"
    if _at(sender, said.lent):
      return f"lent must name others; got {sender} itself."
  if said.is_change:  # The ledger knows the rest of it.
    return None
  return fault_in_debts(said.counts, (count for _, count in said.lent))


def _fault_in_requests(
  sender: InstanceId, said: Heartbeat, num_instances: int
) -> str | None:
  if not said.requests:  # Mostly: it is about nothing but the counts.
    return None
  uids: set[int] = set()
  num_running = num_home = 0
  for blocks in said.requests:
    fault = _fault_in_request(sender, blocks, num_instances)
    if fault is not None:
      return f"request {blocks.uid} {fault}"
    if not (blocks.holders or said.is_change):
      return f"request {blocks.uid} must have rBlocks; got none."
    uids.add(blocks.uid)
    num_running += bool(blocks.holders)
    num_home += _at(sender, blocks.holders)
  if len(uids) < len(said.requests):
    return f"each uid must be named once; got {len(said.requests)} of them."
  if num_running > said.num_running:
    return f"requests must be at most {said.num_running}; got {num_running}."
  own = said.counts.used + said.counts.reserved
  if num_home > own:
    return f"requests must have at most {own} rBlocks at home; got {num_home}."
  return None


def _fault_in_request(
  sender: InstanceId, blocks: RequestBlocks, num_instances: int
) -> str | None:
  if not 1 <= blocks.uid < 2**32:
    return f"must have a uid in [1, 2**32); got {blocks.uid}."
  num_home = _at(sender, blocks.holders)
  if not 0 <= blocks.movable <= num_home:
    return f"must have movable in [0, {num_home}]; got {blocks.movable}."
  return _fault_in_blocks(blocks.holders, num_instances, 1)


def _fault_in_blocks(
  blocks_of: BlocksOf, num_instances: int, least: int
) -> str | None:
  """Instances must be those of the group, each once, with enough rBlocks."""
  for instance, count in blocks_of:
    if not 0 <= instance < num_instances:
      return f"must name instances in [0, {num_instances}); got {instance}."
    if not least <= count <= _MOST_BLOCKS:
      return f"must have [{least}, {_MOST_BLOCKS}] rBlocks; got {count}."
  if len({instance for instance, _ in blocks_of}) < len(blocks_of):
    return f"must name each instance once; got {len(blocks_of)} of them."
  return None


def _fault_in_base(seq: int, base: int | None) -> str | None:
  if base is not None and not 1 <= base < seq:
    return f"base must be None or in [1, {seq}); got {base}."
  return None


def _at(instance: InstanceId, blocks_of: BlocksOf) -> int:
  return sum(count for holder, count in blocks_of if holder == instance)
