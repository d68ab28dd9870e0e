"""Arrays over a mesh that may span several processes.

In one process `jax.device_put` does all of this. Over several it would compare
values in a collective of its own, and does not move shards between kinds of
memory; so there each process handles the shards of its own devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding


def place[Tree](values: Tree, sharding: NamedSharding) -> Tree:
  """Puts values of the host on the devices.

  Args:
    values: Tree of NumPy arrays, alike in all processes.
    sharding: Of each of them.

  Returns:
    Global arrays in the same tree.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(values, sharding)

  def put(value: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
      value.shape, sharding, value.__getitem__
    )

  return jax.tree.map(put, values)


def transfer[Tree](
  arrays: Tree, sharding: NamedSharding, *, may_alias: bool | None = None
) -> Tree:
  """Copies arrays into another kind of memory of the same devices.

  Args:
    arrays: Tree of global arrays that lie on the devices as `sharding` says.
    sharding: With the kind of memory; None is that of the devices.
    may_alias: As of `jax.device_put`.

  Returns:
    Global arrays in the same tree, still being copied.
  """
  if sharding.is_fully_addressable:
    return jax.device_put(arrays, sharding, may_alias=may_alias)
  return transfer_shards(arrays, sharding, may_alias=may_alias)


def transfer_shards[Tree](
  arrays: Tree, sharding: NamedSharding, *, may_alias: bool | None = None
) -> Tree:
  """What `transfer` does over several processes: one call for all shards."""
  leaves, structure = jax.tree.flatten(arrays)
  shards = [[shard.data for shard in x.addressable_shards] for x in leaves]
  to = [[_on_its_device(shard, sharding) for shard in own] for own in shards]
  moved = jax.device_put(shards, to, may_alias=may_alias)
  return jax.tree.unflatten(
    structure,
    [
      jax.make_array_from_single_device_arrays(x.shape, sharding, own)
      for x, own in zip(leaves, moved, strict=True)
    ],
  )


def _on_its_device(shard: jax.Array, sharding: NamedSharding) -> Any:
  (device,) = shard.devices()
  kind = sharding.memory_kind or device.default_memory().kind
  return SingleDeviceSharding(device, memory_kind=kind)
