"""A network and its clocks on one thread: all its faults can be repeated.

Time is virtual: it passes from event to event. What happens depends on the
injected random source and on the calls alone, so one seed gives one history.
"""

import collections
import dataclasses
import heapq
import itertools
import random
from collections.abc import Callable, Iterable

from infinite_llm.distributed.transport.base import Handler
from infinite_llm.errors import InvariantError
from infinite_llm.scheduler.messages import Address, Body, Envelope
from infinite_llm.simulator.faults import Fault, NetworkFaults
from infinite_llm.simulator.trace import Observer


@dataclasses.dataclass(kw_only=True, slots=True)
class _Clock:
  """What an address takes for the time: exact at `anchor_s`, then drifting."""

  anchor_s: float = 0.0
  local_s: float = 0.0
  rate: float = 1.0

  def read(self, now_s: float) -> float:
    return self.local_s + (now_s - self.anchor_s) * self.rate


class SimulatedNetwork:
  """Carries messages between addresses of one thread, more or less.

  It is a `Transport`. Addresses wait with `call_later` and read the time from
  `clock`; `step` and `run_until` make time pass.
  """

  def __init__(
    self,
    rng: random.Random,
    faults: NetworkFaults | None = None,
    observer: Observer | None = None,
  ):
    """Makes a network at time 0 without addresses.

    Args:
      rng: Decides all that happens by chance.
      faults: How messages fare; None has them arrive once, in any order.
      observer: Hears of every event; None costs nothing.
    """
    self.faults = faults or NetworkFaults()
    self._random = rng.random
    self._observer = observer
    self._now_s = 0.0
    # When, which of several, what: an envelope and its number, or a callback
    # and the life of the address that waits.
    self._events: list[
      tuple[float, int, Envelope | Callable[[], None], Address, int]
    ] = []
    self._order = itertools.count()
    self._num_sent = 0
    self._num_of_kind: collections.Counter[type[Body]] = collections.Counter()
    self._num_delivered = 0
    self._handlers: dict[Address, Handler] = {}
    self._crashed: set[Address] = set()
    self._lives: collections.defaultdict[Address, int] = (
      collections.defaultdict(int)
    )
    self._clocks: collections.defaultdict[Address, _Clock] = (
      collections.defaultdict(_Clock)
    )
    self._partitions: list[tuple[frozenset[Address], frozenset[Address]]] = []
    self._newest: dict[tuple[Address, Address], int] = {}
    self._counts = dict.fromkeys(Fault, 0)

  @property
  def now_s(self) -> float:
    """The true time, in seconds."""
    return self._now_s

  @property
  def num_sent(self) -> int:
    """Messages that were sent, whatever became of them."""
    return self._num_sent

  @property
  def num_delivered(self) -> int:
    """Messages that were handed over, repetitions included."""
    return self._num_delivered

  def kinds_sent(self) -> dict[str, int]:
    """How many messages of each kind were sent."""
    return {kind.__name__: count for kind, count in self._num_of_kind.items()}

  def counts(self) -> dict[Fault, int]:
    """How often each fault has happened."""
    return dict(self._counts)

  # The transport.

  def register(self, address: Address, handler: Handler) -> None:
    """Has messages to an address handed to `handler` from now on.

    Raises:
      InvariantError: If the address is crashed: only `restart` brings it back.
    """
    if address in self._crashed:
      raise InvariantError(f"address must not be crashed; got {address!r}.")
    self._handlers[address] = handler

  def send(self, envelope: Envelope) -> None:
    """Takes a message to carry; decides at once when it arrives, if ever.

    Raises:
      InvariantError: If nobody ever registered at the receiver's address, or
        the sender is crashed.
    """
    sender, receiver = envelope.sender, envelope.receiver
    if receiver not in self._handlers and receiver not in self._crashed:
      raise InvariantError(f"receiver must be registered; got {receiver!r}.")
    if sender in self._crashed:
      raise InvariantError(f"sender must not be crashed; got {envelope}.")
    self._num_sent += 1
    self._num_of_kind[type(envelope.body)] += 1
    if self._observer is not None:
      self._observer(self._now_s, "sent", envelope)
    if self._partitions and self._is_cut(sender, receiver):
      self._note(Fault.CUT_OFF, envelope)
      return
    faults = self.faults
    if faults.lost and self._random() < faults.lost:
      self._note(Fault.LOST, envelope)
      return
    self._put_on_its_way(envelope)
    if faults.repeated and self._random() < faults.repeated:
      self._note(Fault.REPEATED, envelope)
      self._put_on_its_way(envelope)

  def deliver(self) -> int:
    """Hands over what has arrived by now; no time passes.

    Returns:
      How many messages there were.
    """
    before = self._num_delivered
    self.run_until(self._now_s)
    return self._num_delivered - before

  # Time.

  def step(self) -> bool:
    """Goes on to the next event.

    Returns:
      Whether there was one.
    """
    if not self._events:
      return False
    self._now_s, _, what, receiver, number = heapq.heappop(self._events)
    if isinstance(what, Envelope):
      self._arrive(what, number)
    elif number == self._lives[receiver]:  # It has not crashed since.
      if self._observer is not None:
        self._observer(self._now_s, "woken", receiver)
      what()
    return True

  def run_until(self, time_s: float) -> None:
    """Lets time pass.

    Args:
      time_s: All events up to this time happen; then it is this late.
    """
    events, step = self._events, self.step
    while events and events[0][0] <= time_s:
      step()
    self._now_s = max(self._now_s, time_s)

  def call_later(
    self, address: Address, delay_s: float, callback: Callable[[], None]
  ) -> None:
    """Wakes an address up, unless it crashes before.

    Args:
      address: Who waits.
      delay_s: How long, by its own clock as that goes now.
      callback: What it does then.

    Raises:
      InvariantError: If the address is crashed.
    """
    if address in self._crashed:
      raise InvariantError(f"address must not be crashed; got {address!r}.")
    if delay_s < 0:
      raise ValueError(f"delay_s must not be negative; got {delay_s}.")
    at_s = self._now_s + delay_s / self._clocks[address].rate
    event = (at_s, next(self._order), callback, address, self._lives[address])
    heapq.heappush(self._events, event)

  def clock(self, address: Address) -> Callable[[], float]:
    """What an address takes for the time: monotonic, in seconds."""
    own = self._clocks[address]

    def read() -> float:  # As `_Clock.read`, which everybody does all the time.
      return own.local_s + (self._now_s - own.anchor_s) * own.rate

    return read

  def skew(
    self, address: Address, *, rate: float = 1.0, jump_s: float = 0.0
  ) -> None:
    """Makes an address's clock go wrong.

    Args:
      address: Whose clock.
      rate: How many of its seconds pass in one true second from now on.
      jump_s: How far it jumps ahead now.
    """
    if not rate > 0:
      raise ValueError(f"rate must be positive; got {rate}.")
    if jump_s < 0:
      raise ValueError(f"jump_s must not be negative; got {jump_s}.")
    own = self._clocks[address]
    own.local_s = own.read(self._now_s) + jump_s
    own.anchor_s = self._now_s
    own.rate = rate
    self._note(Fault.SKEW, address)

  # Faults that last.

  def partition(self, one: Iterable[Address], other: Iterable[Address]) -> None:
    """Lets nothing pass between two sides, also what is on its way."""
    sides = frozenset(one), frozenset(other)
    if not (sides[0] and sides[1]) or sides[0] & sides[1]:
      raise ValueError(
        f"Sides must not be empty and not overlap; got {set(sides[0])} and"
        f" {set(sides[1])}."
      )
    self._partitions.append(sides)
    self._note(Fault.PARTITION, min(sides[0], key=str))

  def heal(self) -> None:
    """Ends all partitions."""
    self._partitions.clear()

  def is_crashed(self, address: Address) -> bool:
    """Whether an address is down."""
    return address in self._crashed

  def crash(self, address: Address) -> None:
    """Stops an address: it hears nothing, and wakes up for nothing.

    What it has sent may still arrive.

    Raises:
      InvariantError: If it is not up.
    """
    if address not in self._handlers:
      raise InvariantError(f"address must be up to crash; got {address!r}.")
    del self._handlers[address]
    self._crashed.add(address)
    self._lives[address] += 1
    self._note(Fault.CRASH, address)

  def restart(self, address: Address, handler: Handler) -> None:
    """Brings an address back; messages to its former self may reach it.

    Raises:
      InvariantError: If it is not crashed.
    """
    if address not in self._crashed:
      raise InvariantError(
        f"address must be crashed to restart; got {address!r}."
      )
    self._crashed.remove(address)
    self._handlers[address] = handler
    self._note(Fault.RESTART, address)

  def _put_on_its_way(self, envelope: Envelope) -> None:
    faults = self.faults
    spread_s = faults.max_delay_s - faults.min_delay_s
    at_s = self._now_s + faults.min_delay_s + spread_s * self._random()
    if faults.late and self._random() < faults.late:
      self._note(Fault.LATE, envelope)
      at_s += faults.late_s * self._random()
    event = (
      at_s,
      next(self._order),
      envelope,
      envelope.receiver,
      self._num_sent,
    )
    heapq.heappush(self._events, event)

  def _arrive(self, envelope: Envelope, number: int) -> None:
    link = sender, receiver = envelope.sender, envelope.receiver
    if self._partitions and self._is_cut(sender, receiver):
      self._note(Fault.CUT_OFF, envelope)
      return
    handler = self._handlers.get(receiver)
    if handler is None:
      self._note(Fault.UNHEARD, envelope)
      return
    if number < self._newest.get(link, 0):
      self._note(Fault.OVERTAKEN, envelope)
    else:
      self._newest[link] = number
    self._num_delivered += 1
    if self._observer is not None:
      self._observer(self._now_s, "delivered", envelope)
    handler(envelope)

  def _is_cut(self, sender: Address, receiver: Address) -> bool:
    for one, other in self._partitions:
      if sender in one:
        if receiver in other:
          return True
      elif sender in other and receiver in one:
        return True
    return False

  def _note(self, fault: Fault, subject: Envelope | Address) -> None:
    self._counts[fault] += 1
    if self._observer is not None:
      self._observer(self._now_s, fault.value, subject)
