"""An engine's outputs and books as messages between processes."""

import dataclasses
import itertools
from collections.abc import Sequence

from infinite_llm.distributed.group_messages import (
  BlockUse,
  EngineUse,
  ErrorNews,
  InstanceBlocks,
  InstanceUse,
  OutputNews,
  Outputs,
  TokenNews,
)
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.outputs import (
  Extent,
  OutputRecord,
  RequestOutput,
  TokenLogprob,
)
from infinite_llm.errors import CapacityError, CoverageError, ModelError
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.types import InstanceId, RequestUid, Tier


def outputs_of(outputs: Sequence[RequestOutput]) -> Outputs:
  """What is new in outputs, as a message.

  Args:
    outputs: In the order in which they came; of a request there may be several.
  """
  news: dict[RequestUid, list[OutputNews]] = {}
  uids, token_ids, texts = [], [], []
  for output in outputs:
    # What comes after news of the same request must not overtake them.
    if output.uid not in news and _is_one_token(output):
      seen = output.seen
      uids.append(output.uid)
      token_ids.append(output.record.token_ids[seen.num_tokens])
      has_text = output.extent.num_pieces > seen.num_pieces
      texts.append(output.record.pieces[seen.num_pieces] if has_text else "")
    else:
      news.setdefault(output.uid, []).append(news_of(output))
  return Outputs(
    uids=tuple(uids),
    token_ids=tuple(token_ids),
    texts=tuple(texts),
    news=tuple(itertools.chain.from_iterable(news.values())),
  )


def _is_one_token(output: RequestOutput) -> bool:
  """Whether a request got just a token, perhaps with a piece, and goes on."""
  extent, seen = output.extent, output.seen
  return (
    extent.num_tokens == seen.num_tokens + 1
    and extent.num_pieces <= seen.num_pieces + 1
    and output.finish_reason is None
    and output.record.logprobs is None
  )


def news_of(output: RequestOutput) -> OutputNews:
  """What is new in an output, as a message."""
  new = slice(output.seen.num_tokens, output.extent.num_tokens)
  pieces = slice(output.seen.num_pieces, output.extent.num_pieces)
  record, error = output.record, output.error
  logprobs = tuple(
    TokenNews(
      token_id=each.token_id,
      logprob=each.logprob,
      top=tuple(each.top.items()),
    )
    for each in (record.logprobs or [])[new]
  )
  return OutputNews(
    uid=output.uid,
    token_ids=tuple(record.token_ids[new]),
    pieces=tuple(record.pieces[pieces]),
    logprobs=logprobs,
    finish_reason=output.finish_reason,
    error=None
    if error is None
    else ErrorNews(kind=type(error).__name__, text=str(error)),
  )


class RemoteRequest:
  """A request that another process runs, as far as its news have come.

  Attributes:
    uid: Its number.
    request_id: Its name.
    instance: Its owner.
    prompt_token_ids: Its prompt.
  """

  def __init__(
    self,
    uid: RequestUid,
    request_id: str,
    instance: InstanceId,
    prompt_token_ids: tuple[int, ...],
    sampling: SamplingParams,
  ):
    """Starts without any."""
    self.uid = uid
    self.request_id = request_id
    self.instance = instance
    self.prompt_token_ids = prompt_token_ids
    self._record = OutputRecord(
      token_ids=[],
      pieces=[],
      logprobs=None if sampling.logprobs is None else [],
    )

  def take(self, news: OutputNews) -> RequestOutput:
    """Adds news; gives what the caller sees now."""
    record = self._record
    seen = record.extent
    record.token_ids.extend(news.token_ids)
    record.pieces.extend(news.pieces)
    if record.logprobs is not None:
      record.logprobs.extend(
        TokenLogprob(
          token_id=each.token_id, logprob=each.logprob, top=dict(each.top)
        )
        for each in news.logprobs
      )
    return self._output(news.finish_reason, _error(news.error), seen)

  def take_token(self, token_id: int, text: str) -> RequestOutput:
    """Adds a token and its text; gives what the caller sees now."""
    record = self._record
    seen = record.extent
    record.token_ids.append(token_id)
    if text:
      record.pieces.append(text)
    return self._output(None, None, seen)

  @property
  def has_token(self) -> bool:
    """Whether any token has come, so that its prompt is computed."""
    return bool(self._record.token_ids)

  def ended(self, reason: str) -> RequestOutput:
    """What the caller sees if it ends here."""
    return self._output(reason, None, self._record.extent)

  def _output(
    self, reason: str | None, error: Exception | None, seen: Extent
  ) -> RequestOutput:
    return RequestOutput(
      uid=self.uid,
      request_id=self.request_id,
      prompt_token_ids=self.prompt_token_ids,
      finish_reason=reason,
      error=error,
      instance=self.instance,
      record=self._record,
      extent=self._record.extent,
      seen=seen,
    )


_ERRORS: dict[str, type[Exception]] = {
  kind.__name__: kind for kind in (CapacityError, CoverageError, ModelError)
}
"""What a request may end with."""


def _error(error: ErrorNews | None) -> Exception | None:
  """The exception; `RuntimeError` if its kind is unknown."""
  if error is None:
    return None
  return _ERRORS.get(error.kind, RuntimeError)(error.text)


def use_of(
  group: LendingGroup,
  batchers: Sequence[Batcher],
  runner: ModelRunner,
  num_unproved_rows: int,
  stalled_rounds: int,
) -> EngineUse:
  """How an engine's instances are used now, and what it did so far."""
  return EngineUse(
    instances=tuple(
      InstanceUse(
        instance=manager.instance,
        counts=manager.counts(),
        host_counts=manager.counts(Tier.HOST),
        lent=tuple(sorted(manager.lent().items())),
        num_running=len(batcher.running),
        num_waiting=len(batcher.waiting),
      )
      for manager, batcher in zip(group.managers, batchers, strict=True)
    ),
    progress=tuple(
      (request.request_id, request.num_computed_tokens)
      for batcher in batchers
      for request in batcher.running
      if 0 < request.num_computed_tokens < len(request.prompt_token_ids)
    ),
    num_blocks_moved=group.num_blocks_moved,
    running=tuple(
      sorted(each.uid for batcher in batchers for each in batcher.running)
    ),
    waiting=tuple(
      sorted(each.uid for batcher in batchers for each in batcher.waiting)
    ),
    stalled_rounds=stalled_rounds,
    num_unproved_rows=num_unproved_rows,
    num_refused=group.num_refused,
    num_void=sum(m.void.total() for m in group.managers),
    num_declined=sum(m.plans.num_declined for m in group.managers),
    num_late_compiles=runner.programs.num_late_compiles,
    launches=tuple(sorted(runner.launches.items())),
  )


def together(uses: list[EngineUse]) -> EngineUse:
  """The use of all processes as one; a group program is launched by all."""
  launches: dict[str, int] = {}
  for name, count in itertools.chain.from_iterable(u.launches for u in uses):
    is_joint = not name.startswith(("local", "grant", "write"))
    before = launches.get(name, 0)
    launches[name] = max(before, count) if is_joint else before + count
  return EngineUse(
    instances=tuple(
      sorted(
        (each for use in uses for each in use.instances),
        key=lambda each: each.instance,
      )
    ),
    progress=tuple(each for use in uses for each in use.progress),
    num_blocks_moved=sum(use.num_blocks_moved for use in uses),
    running=tuple(sorted(uid for use in uses for uid in use.running)),
    waiting=tuple(sorted(uid for use in uses for uid in use.waiting)),
    # Who has nothing to do does not hold the others up.
    stalled_rounds=min(
      (use.stalled_rounds for use in uses if use.running or use.waiting),
      default=0,
    ),
    num_unproved_rows=sum(use.num_unproved_rows for use in uses),
    num_refused=sum(use.num_refused for use in uses),
    num_void=sum(use.num_void for use in uses),
    num_declined=sum(use.num_declined for use in uses),
    num_late_compiles=sum(use.num_late_compiles for use in uses),
    launches=tuple(sorted(launches.items())),
  )


def blocks_of(
  group: LendingGroup, batchers: Sequence[Batcher]
) -> tuple[InstanceBlocks, ...]:
  """What lies in every rBlock of an engine's instances."""
  found = []
  for manager, batcher in zip(group.managers, batchers, strict=True):
    blocks = map(manager.pool.block, range(1, manager.counts().total + 1))
    uses = [
      BlockUse(count=1, state=block.state, uid=block.uid, owner=block.owner)
      for block in blocks
    ]
    pool = [
      dataclasses.replace(use, count=len(list(alike)))
      for use, alike in itertools.groupby(uses)
    ]
    tables = []
    for request in batcher.running:
      table = manager.table(request.uid)
      holders = [table.location(n).instance for n in range(table.num_blocks)]
      tables.append((request.uid, request.request_id, tuple(holders)))
    found.append(
      InstanceBlocks(
        instance=manager.instance, pool=tuple(pool), tables=tuple(tables)
      )
    )
  return tuple(found)
