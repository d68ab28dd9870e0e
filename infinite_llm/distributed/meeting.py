"""A program that all processes run before any of them compiles for long.

XLA's collectives on CPUs want everybody within half a minute of each other the
first time that some devices have one. Processes compile at their own speed, so
devices that will have collectives later meet while nobody is busy.
"""

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from infinite_llm.distributed.mesh import own_instances
from infinite_llm.types import INSTANCE_AXIS


def meet(mesh: Mesh) -> None:
  """Has devices meet as they do in group programs; blocks the host.

  Those of a column do in sums over the instances, all in an exchange.

  Args:
    mesh: That of the lending group.

  Raises:
    ConfigError: If this process has no instance in it, or shares one.
  """
  own_instances(mesh)
  num_instances = mesh.shape[INSTANCE_AXIS]
  to_next = [(i, (i + 1) % num_instances) for i in range(num_instances)]

  def count(one: jax.Array) -> jax.Array:
    return jax.lax.psum(
      jax.lax.ppermute(one, INSTANCE_AXIS, to_next), INSTANCE_AXIS
    )

  counted = jax.jit(
    jax.shard_map(
      count,
      mesh=mesh,
      in_specs=PartitionSpec(INSTANCE_AXIS),
      out_specs=PartitionSpec(),
    )
  )(np.ones(num_instances, np.int32))
  jax.block_until_ready(counted)
