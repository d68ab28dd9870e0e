"""The requests of an engine that have not ended."""

import dataclasses
from collections.abc import Iterator, Sequence

from infinite_llm.engine.stream import OutputStream
from infinite_llm.scheduler.request import Request, RequestStatus
from infinite_llm.types import InstanceId, RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """What the engine keeps of a request beside the scheduler's part.

  Attributes:
    request: The request.
    instance: Its owner.
    stream: Turns its tokens into outputs.
  """

  request: Request
  instance: InstanceId
  stream: OutputStream


class RequestBook:
  """Finds requests by uid and by name, and knows each instance's load."""

  def __init__(self, instances: Sequence[InstanceId]):
    """Starts empty.

    Args:
      instances: Those that requests are for.
    """
    self._entries: dict[RequestUid, Entry] = {}
    self._uid_of: dict[str, RequestUid] = {}
    self._load = dict.fromkeys(instances, 0)

  def __len__(self) -> int:
    return len(self._entries)

  def __contains__(self, uid: RequestUid) -> bool:
    return uid in self._entries

  def __getitem__(self, uid: RequestUid) -> Entry:
    return self._entries[uid]

  def __iter__(self) -> Iterator[Entry]:
    """All of them, by arrival."""
    return iter(self._entries.values())

  def request(self, uid: RequestUid) -> Request:
    """The request of a number."""
    return self._entries[uid].request

  def proved_tokens(self, uid: RequestUid) -> int:
    """How many tokens of a request are computed and proved."""
    return self._entries[uid].request.num_computed_tokens

  def find(self, request_id: str) -> Entry | None:
    """The request of a name; None if there is none, or it has ended."""
    uid = self._uid_of.get(request_id)
    return None if uid is None else self._entries[uid]

  def progress(self, request_id: str) -> tuple[int, int]:
    """Prompt tokens of a request, those computed first; 1 of 1 if it ended."""
    entry = self.find(request_id)
    if entry is None:
      return 1, 1
    total = len(entry.request.prompt_token_ids)
    return min(entry.request.num_computed_tokens, total), total

  def running(self) -> list[Entry]:
    """Those with rBlocks, by arrival."""
    return [
      entry for entry in self if entry.request.status is RequestStatus.RUNNING
    ]

  def unused_name(self, uid: RequestUid) -> str:
    """A name for a request without one; callers may have used any."""
    name = f"request-{uid}"
    while name in self._uid_of:
      name += "-"
    return name

  def least_loaded(self) -> InstanceId:
    """The instance whose requests have the fewest tokens; first of equals."""
    return min(self._load, key=self._load.__getitem__)

  def add(self, entry: Entry) -> None:
    """Takes a request whose name nobody has."""
    self._entries[entry.request.uid] = entry
    self._uid_of[entry.request.request_id] = entry.request.uid
    self._load[entry.instance] += entry.request.num_tokens

  def note_token(self, uid: RequestUid) -> None:
    """Counts a token that a request got."""
    self._load[self._entries[uid].instance] += 1

  def remove(self, uid: RequestUid) -> Entry:
    """Forgets a request that ended; its name is free again."""
    entry = self._entries.pop(uid)
    del self._uid_of[entry.request.request_id]
    self._load[entry.instance] -= entry.request.num_tokens
    return entry
