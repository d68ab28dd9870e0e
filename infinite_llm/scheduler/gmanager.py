"""The gManager: keeps the debt ledger, says who might lend, and plans ahead."""

import collections
import math
from collections.abc import Callable, Iterable, Sequence

from absl import logging

from infinite_llm.config import LendingConfig
from infinite_llm.errors import ConfigError
from infinite_llm.rules import require
from infinite_llm.scheduler.allotment import allot
from infinite_llm.scheduler.cluster_view import ClusterView
from infinite_llm.scheduler.fault_points import Mishap, no_fault
from infinite_llm.scheduler.gmanager_screening import fault_in
from infinite_llm.scheduler.ledger import Ledger, Recorded
from infinite_llm.scheduler.link_costs import LinkCosts
from infinite_llm.scheduler.messages import (
  GMANAGER,
  GMANAGERS,
  Address,
  Body,
  Candidates,
  CandidatesRequest,
  ClusterStatus,
  Envelope,
  FullHeartbeatRequest,
  GManagerAddress,
  Heartbeat,
  Leadership,
  MoveKvcache,
  RecallKvcache,
)
from infinite_llm.scheduler.placement_map import PlacementMap
from infinite_llm.scheduler.planning import PlanningConfig
from infinite_llm.scheduler.policies import get_policy
from infinite_llm.types import NO_EPOCH, Epoch, FaultPoint, InstanceId

_LIVES = 256
"""Starts of one gManager after which its epochs may repeat."""

_LOG_EVERY_S = 10


class GManager:
  """One leads, and another one may stand by. It only proposes.

  Creditors decide for themselves. All that it knows comes from heartbeats, so
  it may start anew at any time, and answers a repeated question from what it
  knows by then.

  A standby hears the same heartbeats and says nothing. When the leader was
  silent for its lease, it leads under a newer epoch: within one heartbeat
  period of the leader's death. Epochs are never shared:
  each life of each gManager has numbers of its own. rManagers ignore older
  epochs than they have heard of and say in heartbeats which that is, so a
  leader that was only slow, or cut off, harms nobody and steps down when it
  hears of the other.

  Attributes:
    is_leader: Whether it answers and plans.
    epoch: Newest epoch that it has heard of; its own if it leads.
    num_plans: Plans that it made.
    refused: Messages that no sane sender would send, by the name of their kind.
  """

  def __init__(
    self,
    lending: LendingConfig,
    clock: Callable[[], float],
    *,
    planning: PlanningConfig | None = None,
    address: GManagerAddress = GMANAGER,
    peers: Sequence[GManagerAddress] = (),
    incarnation: int = 1,
    is_leader: bool = True,
    num_instances: int | None = None,
    faults: FaultPoint = no_fault,
  ):
    """Makes a gManager that knows nobody yet.

    Args:
      lending: The policy, what links cost, and how often what is due.
      clock: Monotonic seconds.
      planning: Rules and budgets of plans; None takes those of `lending`.
      address: Its own.
      peers: The other gManagers.
      incarnation: Rises each time this gManager starts anew.
      is_leader: Whether it leads at once; one that starts anew beside others
        stands by.
      num_instances: I, instances that report to it; None if any may.
      faults: What goes wrong, in a simulation.

    Raises:
      ConfigError: If the policy does not exist or lacks what it needs, an
        address or a number makes no sense, or nobody could ever lead.
    """
    self._policy = get_policy(lending.policy)
    self._planning = planning or PlanningConfig.of(lending)
    if lending.policy == "greedy" and self._planning.performance is None:
      raise ConfigError(
        "performance (LendingConfig.performance_profile) must be a model for"
        " the policy 'greedy'; got None."
      )
    names = ", ".join(GMANAGERS)
    require(address in GMANAGERS, "address", f"one of {names}", address)
    require(
      set(peers) <= set(GMANAGERS) - {address},
      "peers",
      f"some of {names}, and others than address ({address!r})",
      peers,
    )
    require(incarnation >= 1, "incarnation", "at least 1", incarnation)
    require(
      num_instances is None or num_instances >= 1,
      "num_instances",
      "None or at least 1",
      num_instances,
    )
    self._lending = lending
    self._clock = clock
    self._links = LinkCosts(
      domains=lending.link_domains or None, between_s=lending.link_between_s
    )
    self._address: GManagerAddress = address
    self._peers = tuple(peers)
    self._incarnation = incarnation
    self._num_instances = num_instances
    self._faults = faults
    self.refused: collections.Counter[str] = collections.Counter()
    self._ledger = Ledger()
    self._placements = PlacementMap()
    self._outgoing: list[Envelope] = []
    self._last_seq = 0
    self._to_tell: set[InstanceId] = set()
    self._has_news = False
    now = clock()
    self._ticked_s = self._awake_s = now
    self._leader_heard_s = now
    self._announced_s = self._planned_s = -math.inf
    self.num_plans = 0
    self.epoch: Epoch = NO_EPOCH
    self.is_leader = False
    if is_leader:
      self._lead()

  def view(self) -> ClusterView:
    """The ledger and the placement map as they are now."""
    return ClusterView(
      lines=self._ledger.lines(),
      placements=self._placements.placements(),
      links=self._links,
    )

  def on_message(self, envelope: Envelope) -> None:
    """Takes a message; nonsense is `refused` and counted."""
    fault = fault_in(
      envelope,
      address=self._address,
      peers=self._peers,
      num_instances=self._num_instances,
      leader_epoch=self.epoch,
    )
    if fault is not None:
      self._refuse(envelope, fault)
      return
    sender = envelope.sender
    match envelope.body:
      case Leadership():
        self._hear_epoch(envelope.leader_epoch)
        if envelope.leader_epoch == self.epoch and not self.is_leader:
          self._leader_heard_s = self._clock()
      case Heartbeat() as heartbeat if isinstance(sender, int):
        self._hear_epoch(heartbeat.leader_epoch)
        self._on_heartbeat(sender, envelope, heartbeat)
      case CandidatesRequest(num_blocks=wanted) if isinstance(sender, int):
        if self.is_leader:
          rooms = self._policy.rank_creditors(
            self.view(), self._planning, sender, wanted
          )
          if self._faults(Mishap.RANKING_FAILS):
            rooms = ()
          self._answer(envelope, Candidates(rooms=rooms))
      case _:
        pass

  def tick(self) -> None:
    """Does what is due: takes over, forgets the silent, announces, plans.

    To be called each `LendingConfig.leader_beat_s` where there are several.
    """
    now = self._clock()
    # Whoever slept, or was not called, cannot tell who else was silent.
    if now - self._ticked_s > self._lending.leader_lease_s / 2:
      self._leader_heard_s = now
    if now - self._ticked_s > self._lending.expire_after_s / 2:
      self._awake_s = now
    self._ticked_s = now
    if now - self._awake_s >= self._lending.expire_after_s:
      self._expire(now - self._lending.expire_after_s)
    lease_s = self._lending.leader_lease_s
    if not self.is_leader and now - self._leader_heard_s >= lease_s:
      self._lead()
    if not self.is_leader:
      return
    if now - self._announced_s >= self._lending.leader_beat_s:
      self._announced_s = now
      for peer in self._peers:
        self._tell(peer, Leadership())
    if now - self._planned_s >= self._lending.plan_every_s:
      self._planned_s = now
      self._plan()

  def drain_messages(self) -> list[Envelope]:
    """Takes the messages that are to be sent now."""
    if self.is_leader:
      # A newcomer, or a loss, is news to everybody; else only those are told
      # who sent a heartbeat.
      told = self._ledger.instances() if self._has_news else self._to_tell
      if told:
        self._tell_status(told)
    self._has_news = False
    self._to_tell.clear()
    outgoing, self._outgoing = self._outgoing, []
    return outgoing

  def _on_heartbeat(
    self, sender: InstanceId, envelope: Envelope, heartbeat: Heartbeat
  ) -> None:
    is_known = sender in self._ledger
    match self._ledger.record(
      sender, envelope.incarnation, envelope.seq, heartbeat, self._clock()
    ):
      case Recorded.FULL:
        self._placements.replace(sender, heartbeat.requests)
        self._has_news |= not is_known
      case Recorded.CHANGE:
        self._placements.change(sender, heartbeat.requests)
      case Recorded.GAP:
        # A standby waits for the next full one: it has no say yet.
        if self.is_leader:
          self._tell(sender, FullHeartbeatRequest())
      case Recorded.OLD:
        return
      case Recorded.ABSURD:
        self._refuse(envelope, "its change of lent does not fit its counts.")
        return
    self._to_tell.add(sender)

  def _tell_status(self, instances: Iterable[InstanceId]) -> None:
    """Says what instances may count on to borrow."""
    is_borrowing = self._policy.borrows
    allotted = allot(self._ledger.lines_unordered()) if is_borrowing else {}
    for instance in sorted(instances):
      status = ClusterStatus(
        lendable=self._ledger.lendable_to(instance) if is_borrowing else 0,
        allotted_to=allotted.get(instance, 0),
      )
      self._tell(instance, status)

  def _expire(self, moment_s: float) -> None:
    """Forgets those who were silent since a moment."""
    for instance in self._ledger.silent_since(moment_s):
      self._ledger.forget(instance)
      self._placements.forget(instance)
      self._has_news = True

  def _hear_epoch(self, epoch: Epoch) -> None:
    """Follows whoever leads under a newer epoch."""
    if epoch > self.epoch:
      self.epoch = epoch
      self.is_leader = False
      self._leader_heard_s = self._clock()

  def _lead(self) -> None:
    """Begins to lead, under the next epoch that is this gManager's own."""
    self.is_leader = True
    own = self._incarnation % _LIVES * len(GMANAGERS)
    own += GMANAGERS.index(self._address)
    self.epoch += 1 + (own - self.epoch - 1) % (_LIVES * len(GMANAGERS))
    self._announced_s = -math.inf
    self._planned_s = self._clock()
    self._has_news = True
    for instance in self._ledger.incomplete():
      self._tell(instance, FullHeartbeatRequest())

  def _plan(self) -> None:
    """Sends what the policy plans to the owners.

    Instances on circles of debts are to take their rBlocks home, and get no
    moves until that is done.
    """
    view = self.view()
    recalls = self._policy.plan_recalls(view, self._planning)
    frozen = {recall.owner for recall in recalls}
    for recall in recalls:
      body = RecallKvcache(
        uid=recall.uid,
        num_blocks=recall.num_blocks,
        src=recall.src,
        freeze_s=self._lending.freeze_s,
      )
      self._tell(recall.owner, body)
    for move in self._policy.plan_moves(view, self._planning):
      if frozen.isdisjoint((move.owner, move.dst)):
        body = MoveKvcache(
          uid=move.uid,
          num_blocks=move.num_blocks,
          dst=move.dst,
          with_request=move.with_request,
        )
        self._tell(move.owner, body)
    self.num_plans += 1

  def _refuse(self, envelope: Envelope, fault: str) -> None:
    kind = type(envelope.body).__name__
    self.refused[kind] += 1
    logging.log_every_n_seconds(
      logging.WARNING,
      "The gManager at %r refused a %s from %r: %s",
      _LOG_EVERY_S,
      self._address,
      kind,
      envelope.sender,
      fault,
    )

  def _answer(self, request: Envelope, body: Candidates) -> None:
    self._send(request.sender, request.incarnation, request.seq, body)

  def _tell(self, receiver: Address, body: Body) -> None:
    self._last_seq += 1
    self._send(receiver, self._incarnation, self._last_seq, body)

  def _send(
    self, receiver: Address, incarnation: int, seq: int, body: Body
  ) -> None:
    envelope = Envelope(
      sender=self._address,
      receiver=receiver,
      incarnation=incarnation,
      seq=seq,
      body=body,
      leader_epoch=self.epoch,
    )
    self._outgoing.append(envelope)
