"""What the processes of a lending group say to each other.

Managers talk by a transport that may lose messages; this is for what must
arrive, in order: process 0 (the leader) takes requests, agrees on headers and
collects outputs, the others (members) have instances of their own. One JAX job
is one failure domain, so whoever cannot say it any more ends with the group.
"""

import dataclasses

from infinite_llm.cache.rblock import BlockState
from infinite_llm.distributed.step_header import GroupWork
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.types import (
  InstanceId,
  PoolCounts,
  RequestUid,
  Text,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hello:
  """A member's first words.

  Attributes:
    process: Its number.
    settings: `(name, value)` of all that must be alike in all processes.
    target: `host:port` of its managers' transport.
    instances: Numbers of its instances.
  """

  process: int
  settings: tuple[tuple[Text, Text], ...]
  target: Text
  instances: tuple[InstanceId, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
  """The leader does not want a member.

  Attributes:
    reason: Why.
  """

  reason: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Welcome:
  """All members are there.

  Attributes:
    targets: `host:port` of the transport of each process.
    instances: Numbers of the instances of each process.
  """

  targets: tuple[Text, ...]
  instances: tuple[tuple[InstanceId, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Open:
  """Members are to load a model and build an engine, as the leader does now.

  Attributes:
    model: Folder of the checkpoint.
    config: The engine's configuration, as a JSON object of its parts.
  """

  model: Text
  config: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Close:
  """No more engines: members end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """What a member has for a turn.

  Attributes:
    number: The first turn that it has not taken.
    work: What it has, as far as it knows.
  """

  number: int
  work: GroupWork


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """Somebody has something for a turn: all are to get ready for it.

  Attributes:
    number: Its number.
  """

  number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
  """A member can begin a turn that was called within a decode step.

  Attributes:
    number: Its number.
  """

  number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """The header of the next turn.

  Attributes:
    number: Its number.
    work: What all launch.
  """

  number: int
  work: GroupWork


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submit:
  """A request for a member's instance.

  Attributes:
    uid: Its number in the whole group.
    request_id: Its name.
    instance: Its owner.
    prompt: Its token ids.
    sampling: How to choose its tokens.
  """

  uid: RequestUid
  request_id: Text
  instance: InstanceId
  prompt: tuple[int, ...]
  sampling: SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abort:
  """The caller does not want a request any more.

  Attributes:
    request_id: Its name.
  """

  request_id: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class GiveUp:
  """The group is stalled, and a member's request is to make room.

  Attributes:
    uid: The request.
    is_alone: Whether nobody else has rBlocks, so that it fails.
  """

  uid: RequestUid
  is_alone: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComeBack:
  """Somebody else has ended, so a request that gave way may run again."""

  uid: RequestUid


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenNews:
  """Log-probabilities of a token, as `TokenLogprob` has them."""

  token_id: int
  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorNews:
  """What went wrong with a request.

  Attributes:
    kind: Name of the exception.
    text: What it says.
  """

  kind: str
  text: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputNews:
  """What is new in a request since the last news of it.

  Attributes:
    uid: Its number; a name may be that of another request by now.
    token_ids: New tokens.
    pieces: New pieces of text.
    logprobs: One per new token, if they were asked for.
    finish_reason: Why it ended; None if it goes on.
    error: What went wrong, if that is why.
  """

  uid: RequestUid
  token_ids: tuple[int, ...]
  pieces: tuple[Text, ...]
  logprobs: tuple[TokenNews, ...]
  finish_reason: str | None
  error: ErrorNews | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
  """What a step of a member gave.

  Nearly all requests get one token and go on. Those are told by columns, since
  to read an object for each holds up process 0 ten times as long. All of them
  come before `news`.

  Attributes:
    uids: Requests that got one token each, without log-probabilities.
    token_ids: The token of each.
    texts: What it added to the text of each, perhaps nothing.
    news: What is new in all others.
  """

  uids: tuple[RequestUid, ...] = ()
  token_ids: tuple[int, ...] = ()
  texts: tuple[Text, ...] = ()
  news: tuple[OutputNews, ...] = ()

  def __post_init__(self):
    """Refuses columns that do not fit together."""
    if not len(self.uids) == len(self.token_ids) == len(self.texts):
      raise ValueError(
        "uids, token_ids and texts must be of one length; got"
        f" {len(self.uids)}, {len(self.token_ids)} and {len(self.texts)}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceUse:
  """How an instance is used now.

  Attributes:
    instance: Its number.
    counts: Of its rBlocks.
    host_counts: Of its HOST rBlocks; all zero if it has none.
    lent: rBlocks promised to or held for other instances.
    num_running: Requests that run.
    num_waiting: Requests that wait.
  """

  instance: InstanceId
  counts: PoolCounts
  host_counts: PoolCounts
  lent: tuple[tuple[InstanceId, int], ...]
  num_running: int
  num_waiting: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineUse:
  """What an engine has done so far.

  Attributes:
    instances: Use of its instances now, in their order.
    progress: `(name, computed)` prompt tokens of requests whose prompt is
      computed in part.
    running: Requests with rBlocks, by arrival.
    waiting: Requests without, by arrival.
    stalled_rounds: Rounds of messages in which nothing went on.
    num_blocks_moved: rBlocks that its instances sent to others.
    num_unproved_rows: Rows that were tried again.
    num_refused: Messages of managers that no sane sender would send.
    num_void: Messages of gManagers that did not count: of a former leader, come
      again or overtaken.
    num_declined: Plans of the gManager that could not be followed.
    num_late_compiles: Compilations after warm-up.
    launches: `(program, times)`.
  """

  instances: tuple[InstanceUse, ...]
  progress: tuple[tuple[Text, int], ...]
  running: tuple[RequestUid, ...]
  waiting: tuple[RequestUid, ...]
  stalled_rounds: int
  num_blocks_moved: int
  num_unproved_rows: int
  num_refused: int
  num_void: int
  num_declined: int
  num_late_compiles: int
  launches: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlocksRequest:
  """The leader wants to know what lies in each rBlock."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockUse:
  """What rBlocks in a row are used for.

  Attributes:
    count: How many of them there are.
    state: Where they are in their lives.
    uid: The request whose KV they hold; None when free.
    owner: The instance that runs that request; None when free.
  """

  count: int
  state: BlockState
  uid: RequestUid | None
  owner: InstanceId | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceBlocks:
  """What lies in the rBlocks of an instance.

  Attributes:
    instance: Its number.
    pool: Its rBlocks in order, without the null one.
    tables: `(uid, name, holders)` of its own running requests: the instance
      that holds each of their rBlocks.
  """

  instance: InstanceId
  pool: tuple[BlockUse, ...]
  tables: tuple[tuple[RequestUid, Text, tuple[InstanceId, ...]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """What lies in the rBlocks of a member's instances."""

  instances: tuple[InstanceBlocks, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
  """A member cannot go on, and says why before it ends."""

  reason: Text


type FromLeader = (
  Refused
  | Welcome
  | Open
  | Close
  | Call
  | Turn
  | Submit
  | Abort
  | GiveUp
  | ComeBack
  | BlocksRequest
)
type FromMember = Hello | Ask | Ready | Outputs | EngineUse | Blocks | Failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeaderFrame:
  """A message of the leader."""

  body: FromLeader


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberFrame:
  """A message of a member."""

  body: FromMember
