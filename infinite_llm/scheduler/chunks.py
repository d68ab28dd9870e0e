"""How many tokens of a request the next step of an instance computes."""

from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.scheduler.request import Request
from infinite_llm.scheduler.rmanager import RManager
from infinite_llm.scheduler.step_plan import Draft, Row

_BORROW_CHUNKS = 2
"""Room that a borrow makes, in prefill chunks: moving blocks takes a few rounds
of messages, so one borrow serves several steps."""


class Chunks:
  """Sizes of rows, by the program that computes them.

  Attributes:
    joined_tokens: Of a local program for which others may wait: no more than
      the smallest one that takes as many as a group step. It takes as long
      with fewer.
  """

  def __init__(
    self,
    rmanager: RManager,
    scheduler: SchedulerConfig,
    lending: LendingConfig,
    block_size: int,
  ):
    """Keeps what decides.

    Args:
      rmanager: The instance's manager.
      scheduler: Sizes of a step.
      lending: Sizes of group prefill steps.
      block_size: P, tokens per rBlock.
    """
    self._block_size = block_size
    self._rmanager = rmanager
    self._scheduler = scheduler
    self._lending = lending
    self.joined_tokens = next(
      (
        size
        for size in scheduler.prefill_buckets
        if size >= lending.group_prefill_buckets[-1]
      ),
      scheduler.chunk_tokens,
    )

  def wanted(
    self, request: Request, draft: Draft, *, is_group: bool, is_layered: bool
  ) -> int:
    """Tokens that a request may have beside those in a draft; 0 for none.

    Args:
      request: One that has tokens to compute.
      draft: What the step has so far.
      is_group: Whether the request has rBlocks elsewhere.
      is_layered: Whether it has rBlocks in HOST.
    """
    rest = request.num_unlaunched
    if is_layered:
      may_run = is_group or draft.ceiling.long
      most = self._layered_tokens if may_run else 0
    elif rest > 1:
      most = self._prefill_room(request, draft, is_group)
    else:
      most = 0 if is_group and not draft.ceiling.group.decode else 1
    return min(most, rest)

  def _prefill_room(
    self, request: Request, draft: Draft, is_group: bool
  ) -> int:
    """Prompt tokens that a request may have beside those in a draft."""
    if not is_group:
      most = self._local_tokens(draft.ceiling.is_joined)
      return draft.prefill_room(self._scheduler, most)
    if draft.group_prefill:
      return 0
    return min(self.group_tokens(request), draft.ceiling.group.prefill_tokens)

  def awaits_room(self, request: Request, under_way: Row | None) -> bool:
    """Whether a request has no next group row before moves have ended.

    Asking for its step would cost all instances a step without rows.

    Args:
      request: One with rBlocks elsewhere.
      under_way: Its row under way, which is taken for done.
    """
    overflow = self._rmanager.overflow
    # A plan makes room for the one that attends HOST before its turn comes.
    if request.uid != overflow.attended and not self._rmanager.is_borrowing():
      return False
    start = request.num_computed_tokens if under_way is None else under_way.end
    end = min(start + self.group_tokens(request), request.num_tokens)
    table = self._rmanager.table(request.uid)
    missing = self._num_blocks(end) - table.num_blocks
    free = self._rmanager.pool.num_free
    return missing > 0 and missing > overflow.room(request.uid, free)

  def borrow(self, missing: int, coming: int) -> int:
    """rBlocks to borrow at once.

    Args:
      missing: rBlocks that are needed now.
      coming: Those that will be, for prompts.
    """
    chunk_tokens = self._scheduler.chunk_tokens
    group_tokens = self._lending.group_prefill_buckets[-1]
    most = _BORROW_CHUNKS * self._num_blocks(chunk_tokens)
    least = _BORROW_CHUNKS * self._num_blocks(min(group_tokens, chunk_tokens))
    return max(least, min(coming, most), missing)

  def group_tokens(self, request: Request) -> int:
    """Tokens whose group step takes as long as is allowed, by the last one.

    One that attends HOST takes as long as it takes.
    """
    if self._rmanager.table(request.uid).num_host:
      return self._layered_tokens
    buckets = self._lending.group_prefill_buckets
    if request.group_token_s <= 0:
      return buckets[-1]
    tokens = self._lending.group_chunk_s / request.group_token_s
    return int(min(max(tokens, buckets[0]), buckets[-1]))

  @property
  def _layered_tokens(self) -> int:
    """Tokens of a step that attends HOST."""
    most = self._scheduler.chunk_tokens
    return self._rmanager.overflow.chunk_tokens(most)

  def _num_blocks(self, num_tokens: int) -> int:
    return -(-num_tokens // self._block_size)

  def _local_tokens(self, is_joined: bool) -> int:
    """Prompt tokens of a local program: fewer where others may wait for it."""
    is_owing = self._rmanager.num_free_slots < self._lending.spill_slots
    if is_joined or is_owing or self._rmanager.pool.num_lent:
      return self.joined_tokens
    return self._scheduler.chunk_tokens
