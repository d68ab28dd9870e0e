"""Makes requests and trouble in a simulated cluster, as its seed decides."""

import collections
import random
from collections.abc import Callable

from infinite_llm.scheduler.messages import Address
from infinite_llm.simulator.cluster import OUTSIDE, Cluster
from infinite_llm.simulator.gmanagers import ADDRESSES
from infinite_llm.simulator.instance import Instance
from infinite_llm.simulator.nonsense import draw_nonsense

_FEW_INSTANCES = 5
"""In larger clusters what concerns all happens as often as in one of so many;
what concerns one or two, as often to each."""

_MOST_POOLS = 5
"""Pools that one request may fill: in a large cluster others run beside it."""


class Adversary:
  """Disturbs a cluster until it is told to heal it.

  Attributes:
    counts: How often it did what, beside the network's faults.
  """

  def __init__(self, cluster: Cluster, rng: random.Random):
    """Begins to make requests and trouble.

    Args:
      cluster: What to disturb.
      rng: Decides.
    """
    self.counts: collections.Counter[str] = collections.Counter()
    self._cluster = cluster
    self._rng = rng
    self._network = cluster.world.network
    self._scenario = cluster.world.scenario
    self._is_active = True
    self._troubles: tuple[Callable[[], None], ...] = (
      self._crash_instance,
      self._crash_gmanager,
      self._part,
      self._skew,
      self._abort,
      self._preempt,
      self._freeze,
      self._spoil,
      self._talk_nonsense,
    )
    self._request()
    self._wait(self._scenario.request_every_s, self._request_again)
    self._wait(self._scenario.trouble_every_s, self._trouble)
    self._wait(self._scenario.plan_every_s, self._plan)

  def heal(self) -> None:
    """Ends all trouble: everybody is up, and every message arrives.

    Half of the requests are called off: the others must still end.
    """
    self._is_active = False
    self._cluster.heal()
    for instance in self._cluster.instances:
      for request in instance.batcher.running + instance.batcher.waiting:
        if self._rng.random() < 0.5:
          self._cluster.abort(instance, request)

  def _wait(self, mean_s: float, callback: Callable[[], None]) -> None:
    self._network.call_later(OUTSIDE, 2 * mean_s * self._rng.random(), callback)

  def _request_again(self) -> None:
    if self._is_active:
      self._request()
      self._wait(self._scenario.request_every_s, self._request_again)

  def _request(self) -> None:
    """A short request, or one that needs the memory of several."""
    up = self._cluster.up
    if not up or self._cluster.num_open >= self._scenario.most_open:
      return
    rng, size = self._rng, self._scenario.block_size
    own = (self._scenario.num_blocks - 1) * size
    longest = own // 3
    if rng.random() < 0.5:
      longest = min(self._scenario.most_blocks * size, _MOST_POOLS * own)
    is_long = rng.random() >= 1 - self._scenario.long_answers
    output = rng.randint(1, 40 if is_long else 6)
    prompt = rng.randint(1, max(longest - output, 1))
    self._cluster.add_request(rng.choice(up), prompt, output)

  def _trouble(self) -> None:
    if self._is_active:  # What it does may end in somebody's death.
      self._wait(self._scenario.trouble_every_s, self._trouble)
      self._rng.choice(self._troubles)()

  def _plan(self) -> None:
    if self._is_active:
      self._wait(self._scenario.plan_every_s, self._plan)
      self._rng.choice((self._move, self._recall))()

  def _crash_instance(self) -> None:
    up = self._cluster.up
    # Somebody must be there to be disturbed.
    if len(up) < 2 or self._rng.random() < 0.5:
      return
    number = self._rng.choice(up).number
    self._cluster.crash(number)
    self._wait(self._scenario.crash_s / 2, lambda: self._cluster.revive(number))

  def _crash_gmanager(self) -> None:
    address = self._rng.choice(ADDRESSES)
    if self._network.is_crashed(address) or not self._may_concern_all():
      return
    self._cluster.gmanagers.crash(address)
    self._wait(
      self._scenario.crash_s / 2, lambda: self._cluster.revive(address)
    )

  def _part(self) -> None:
    addresses: list[Address] = [
      *ADDRESSES,
      *range(self._scenario.num_instances),
    ]
    self._rng.shuffle(addresses)
    if self._rng.random() < 0.5:  # Two cannot talk to each other.
      self._network.partition(addresses[:1], addresses[1:2])
    elif self._may_concern_all():
      cut = self._rng.randint(1, len(addresses) - 1)
      self._network.partition(addresses[:cut], addresses[cut:])
    self._wait(self._scenario.partition_s / 2, self._network.heal)

  def _may_concern_all(self) -> bool:
    share = _FEW_INSTANCES / self._scenario.num_instances
    return self._rng.random() < share

  def _skew(self) -> None:
    whose: Address = self._rng.choice(
      (*ADDRESSES, *range(self._scenario.num_instances))
    )
    most = self._scenario.clock_rate
    jump_s = 0.0
    if self._rng.random() < self._scenario.clock_jump:
      jump_s = self._rng.uniform(0, self._scenario.lending.lease_s)
      self._cluster.world.jumped_s[whose] = self._network.now_s
    self._network.skew(
      whose, rate=self._rng.uniform(1 - most, 1 + most), jump_s=jump_s
    )

  def _abort(self) -> None:
    instance = self._busy_instance()
    if instance is None:
      return
    requests = instance.batcher.running + instance.batcher.waiting
    self._cluster.abort(instance, self._rng.choice(requests))
    self.counts["abort"] += 1

  def _preempt(self) -> None:
    instance = self._busy_instance()
    if instance is None or instance.has_flight:
      return
    running = instance.batcher.running
    if running:
      uid = self._rng.choice(running).uid
      if self._rng.random() < 0.7:
        instance.batcher.set_aside(uid)
        self.counts["set aside"] += 1
      else:
        instance.batcher.preempt(uid)
        self.counts["preempt"] += 1
      instance.settle()

  def _move(self) -> None:
    """A planned move, as a gManager may order it."""
    instance = self._busy_instance()
    if instance is None or not instance.batcher.running:
      return
    rng, count = self._rng, self._scenario.num_instances
    uid = rng.choice(instance.batcher.running).uid
    dst = (instance.number + rng.randrange(1, count)) % count
    if instance.move(uid, rng.randint(1, 4), dst):
      self.counts["move"] += 1

  def _recall(self) -> None:
    """A recall, as a gManager may order it."""
    spilled = [
      (instance, request.uid, creditor)
      for instance in self._cluster.up
      for request in instance.batcher.running
      for creditor in instance.manager.table(request.uid).creditors()
    ]
    if spilled:
      instance, uid, creditor = self._rng.choice(spilled)
      count = self._rng.randint(1, 4)
      if instance.manager.recall_kvcache(uid, count, creditor):
        self.counts["recall"] += 1
      instance.settle()

  def _freeze(self) -> None:
    up = self._cluster.up
    if up:
      self._rng.choice(up).manager.plans.freeze(self._rng.uniform(0, 1))
      self.counts["freeze"] += 1

  def _spoil(self) -> None:
    """Something wrote over an rBlock's tag, so nothing proves its content."""
    up = self._cluster.up
    if up:
      number = self._rng.choice(up).number
      plane = self._cluster.world.plane
      tags = plane.devices[number].tag
      if plane.hosts[number].tag and self._rng.random() < 0.5:
        tags = plane.hosts[number].tag
      tags[self._rng.randrange(1, len(tags))] = 0
      self.counts["spoil"] += 1

  def _talk_nonsense(self) -> None:
    """Somebody says what nobody in his senses would say."""
    rng, world = self._rng, self._cluster.world
    up: list[Address] = [instance.number for instance in self._cluster.up]
    gmanagers: list[Address] = list(self._cluster.gmanagers.up)
    if len(up) < 2:
      return
    sender, receiver = rng.sample(up, 2)
    if gmanagers and rng.random() < 0.5:
      receiver = rng.choice(gmanagers)
      if rng.random() < 0.3:
        sender, receiver = receiver, sender
    envelope = draw_nonsense(rng, sender, receiver)
    world.nonsense[id(envelope)] = envelope
    self._network.send(envelope)
    self.counts["nonsense"] += 1

  def _busy_instance(self) -> Instance | None:
    busy = [i for i in self._cluster.up if i.batcher.has_work]
    return self._rng.choice(busy) if busy else None
