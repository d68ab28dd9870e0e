"""What lies in every rBlock of a lending group, at one moment."""

import dataclasses

from infinite_llm.cache.rblock import BlockState
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.group_engine import GroupEngine
from infinite_llm.types import InstanceId


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockUse:
  """What one rBlock is used for.

  Attributes:
    state: Where it is in its life.
    request: Name of the request whose KV it holds; None when free.
    owner: The instance that runs that request; None when free.
  """

  state: BlockState = BlockState.FREE
  request: str | None = None
  owner: InstanceId | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMap:
  """The pools of all instances.

  Attributes:
    block_size: Tokens per rBlock.
    pools: For each instance, its rBlocks without the null block.
    holders: For each request with rBlocks, the instance that holds each of
      them, in the order of its tokens.
  """

  block_size: int
  pools: tuple[tuple[BlockUse, ...], ...]
  holders: dict[str, tuple[InstanceId, ...]]

  def num_hosted(self, instance: InstanceId, debtor: InstanceId) -> int:
    """How many rBlocks an instance holds, or will, for another one."""
    return sum(use.owner == debtor for use in self.pools[instance])


def take_block_map(engine: Engine | GroupEngine) -> BlockMap:
  """Looks at the books of all instances; changes nothing."""
  instances = engine.blocks()
  names = {uid: name for each in instances for uid, name, _ in each.tables}
  return BlockMap(
    block_size=engine.config.cache.block_size,
    pools=tuple(
      tuple(
        BlockUse(
          state=use.state,
          request=None if use.uid is None else names.get(use.uid, "ended"),
          owner=use.owner,
        )
        for use in each.pool
        for _ in range(use.count)
      )
      for each in instances
    ),
    holders={
      name: holders for each in instances for _, name, holders in each.tables
    },
  )
