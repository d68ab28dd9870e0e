"""Compares what an exchange brought with what was sent: for debugging."""

from collections.abc import Sequence

import jax

from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.movement import Arrivals
from infinite_llm.errors import InvariantError


def check_arrivals(
  arrivals: Sequence[Arrivals], pools: Sequence[BlockPool]
) -> None:
  """Compares the checksums of both ends; blocks the host.

  Each process looks at what its own instances received.

  Args:
    arrivals: Of each instance of this process; empty if moves are not verified.
    pools: Books of the same instances, which know whose rBlocks these are.

  Raises:
    InvariantError: If an rBlock is not what was sent.
  """
  for mine, pool in zip(arrivals, pools, strict=bool(arrivals)):
    block, is_accepted, sent, found = jax.device_get(mine)
    for at in zip(*(is_accepted & (sent != found)).nonzero(), strict=True):
      _, rank, _ = at
      raise InvariantError(
        f"The exchange changed an rBlock: instance {pool.instance} received"
        f" {pool.block(int(block[at]))}, sent with checksum"
        f" {int(sent[at]):#x} and found with {int(found[at]):#x} on tensor"
        f" rank {rank}."
      )
