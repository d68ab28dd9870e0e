"""Which holder has how many rBlocks of which request; soft state too."""

from collections.abc import Iterable

from infinite_llm.scheduler.cluster_view import Placement
from infinite_llm.scheduler.messages import RequestBlocks
from infinite_llm.types import InstanceId, RequestUid


class PlacementMap:
  """Running requests of each owner, as its heartbeats say."""

  def __init__(self):
    """Makes a map without requests."""
    self._owned: dict[InstanceId, dict[RequestUid, Placement]] = {}

  def replace(
    self, owner: InstanceId, requests: Iterable[RequestBlocks]
  ) -> None:
    """Takes in all requests of an owner."""
    self._owned[owner] = {}
    self.change(owner, requests)

  def change(
    self, owner: InstanceId, requests: Iterable[RequestBlocks]
  ) -> None:
    """Takes in what is different now; one without holders has ended."""
    owned = self._owned.setdefault(owner, {})
    for blocks in requests:
      if blocks.holders:
        owned[blocks.uid] = Placement(owner=owner, blocks=blocks)
      else:
        owned.pop(blocks.uid, None)

  def forget(self, owner: InstanceId) -> None:
    """Drops all requests of an owner."""
    self._owned.pop(owner, None)

  def placements(self) -> tuple[Placement, ...]:
    """All requests, by rising owner, then by rising uid."""
    return tuple(
      placement
      for _, owned in sorted(self._owned.items())
      for _, placement in sorted(owned.items())
    )
