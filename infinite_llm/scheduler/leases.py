"""Until when a lease lives: what its creditor holds to, and its owner trusts.

Everything that a creditor lends to one owner lives as long as the owner is
heard. The owner trusts a lease for less: counted from the sending of a message
that the creditor has answered, and shortened by what their clocks may differ.
So an owner always stops reading before its creditor gives an rBlock away.
"""

from collections.abc import Callable

from infinite_llm.types import InstanceId, value_type

MAX_CLOCK_SKEW = 0.1
"""How much faster one clock may run than another: 1.1 s while that shows 1 s.

With a larger difference a creditor may end leases that their owner still
trusts; coverage then fails and the owner computes anew, but no token is wrong.
"""


@value_type
class Owner:
  """Whose a lease is.

  Attributes:
    instance: The instance that borrowed.
    incarnation: Its incarnation; leases end with it.
  """

  instance: InstanceId
  incarnation: int


class LeaseDeadlines:
  """A creditor's side: which owners were silent for too long."""

  def __init__(self, lease_s: float, clock: Callable[[], float]):
    """Makes the deadlines of a creditor that has heard of nobody.

    Args:
      lease_s: Seconds of silence that end an owner's leases.
      clock: Monotonic seconds.
    """
    self._lease_s = lease_s
    self._clock = clock
    self._heard_s: dict[InstanceId, float] = {}
    self._checked_s = clock()
    # No later than when any of them was heard: nobody needs to be looked at
    # until that is a lease ago.
    self._oldest_s = self._checked_s

  def renew(self, owner: InstanceId) -> None:
    """Notes a message of an owner: its leases begin anew."""
    self._heard_s[owner] = self._clock()

  def take_expired(self) -> tuple[InstanceId, ...]:
    """Finds the owners whose leases end now; to be called often.

    If the last call was more than half a lease ago, the creditor itself slept:
    messages may wait to be read, so everybody gets one more lease.

    Returns:
      Owners that were silent for a lease, each once, by rising number.
    """
    now = self._clock()
    has_slept = now - self._checked_s > self._lease_s / 2
    self._checked_s = now
    if has_slept:
      self._heard_s = dict.fromkeys(self._heard_s, now)
    if now - self._oldest_s < self._lease_s:
      return ()
    expired = [
      owner
      for owner, heard_s in self._heard_s.items()
      if now - heard_s >= self._lease_s
    ]
    for owner in expired:
      del self._heard_s[owner]
    self._oldest_s = min(self._heard_s.values(), default=now)
    return tuple(sorted(expired))


class LeaseTrust:
  """An owner's side: until when its leases at each creditor surely live.

  An answer that comes while a creditor is trusted prolongs the trust. Once it
  has lapsed, a later answer proves only that the creditor lives now: leases may
  have ended in between, so the owner must sync what it reads there.
  """

  def __init__(self, lease_s: float, clock: Callable[[], float]):
    """Makes an owner that trusts nobody.

    Args:
      lease_s: The creditors' lease time.
      clock: Monotonic seconds.
    """
    self._trust_s = lease_s / (1 + MAX_CLOCK_SKEW)
    self._clock = clock
    self._until_s: dict[InstanceId, float] = {}

  def holds(self, creditor: InstanceId) -> bool:
    """Whether leases at a creditor surely live now."""
    until_s = self._until_s.get(creditor)
    return until_s is not None and self._clock() < until_s

  def is_recent(self, sent_s: float) -> bool:
    """Whether leases named by an answer that came just now surely live.

    Args:
      sent_s: When the message that it answers was first sent.
    """
    return self._clock() < sent_s + self._trust_s

  def acknowledge(self, creditor: InstanceId, sent_s: float) -> None:
    """Notes an answer; `take_lapsed` comes before it.

    Args:
      creditor: Who answered.
      sent_s: When the message that it answers was first sent.
    """
    if self.is_recent(sent_s):
      until_s = sent_s + self._trust_s
      known_s = self._until_s.get(creditor, until_s)
      self._until_s[creditor] = max(known_s, until_s)

  def take_lapsed(self) -> tuple[InstanceId, ...]:
    """Stops to trust those who have not answered for too long.

    Returns:
      Their numbers, each once, rising.
    """
    if not self._until_s:
      return ()
    now = self._clock()
    lapsed = [c for c, until_s in self._until_s.items() if now >= until_s]
    for creditor in lapsed:
      self.forget(creditor)
    return tuple(sorted(lapsed))

  def forget(self, creditor: InstanceId) -> None:
    """Stops to trust a creditor."""
    self._until_s.pop(creditor, None)
