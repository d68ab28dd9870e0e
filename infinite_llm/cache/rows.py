"""One array, two views: whole over the mesh, or one instance's row of it.

Local programs run on an instance's own row of the mesh, group programs on all
of it, and both must see the same buffers: nothing here copies device memory.
"""

from collections.abc import Iterable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinite_llm.types import INSTANCE_AXIS


def split_rows(
  array: jax.Array, rows: Sequence[Mesh], spec: PartitionSpec
) -> list[jax.Array]:
  """Views a global array as one array per row of the mesh.

  Args:
    array: Global array, sharded by `spec` over the whole mesh.
    rows: The `(1, tensor)` meshes of the instances of this process.
    spec: Partition of `array` over ("instance", "tensor").

  Returns:
    One array per row, made of the same buffers. A dimension sharded over
    "instance" is divided by the number of instances.

  Raises:
    TypeError: If the array is not sharded over a mesh.
  """
  if not isinstance(array.sharding, NamedSharding):
    raise TypeError(f"array must be sharded over a mesh; got {array.sharding}.")
  num_instances = array.sharding.mesh.shape[INSTANCE_AXIS]
  shape = tuple(
    size // num_instances if INSTANCE_AXIS in _axes(spec, dim) else size
    for dim, size in enumerate(array.shape)
  )
  buffers = {shard.device: shard.data for shard in array.addressable_shards}
  return [
    jax.make_array_from_single_device_arrays(
      shape,
      NamedSharding(row, spec),
      [buffers[device] for device in row.devices.flat],
    )
    for row in rows
  ]


def split_fields(
  fields: Iterable[jax.Array], rows: Sequence[Mesh], spec: PartitionSpec
) -> list[tuple[jax.Array, ...]]:
  """Views several global arrays, of one partition, as a tuple for each row.

  Args:
    fields: As for `split_rows`; without any there are no tuples.
    rows: As for `split_rows`.
    spec: As for `split_rows`.
  """
  split = (split_rows(field, rows, spec) for field in fields)
  return list(zip(*split, strict=True))


def join_rows(
  rows: Sequence[jax.Array], mesh: Mesh, spec: PartitionSpec
) -> jax.Array:
  """Views one array per row as the global array; inverse of `split_rows`.

  Args:
    rows: One array per instance of this process, in mesh order.
    mesh: The whole mesh.
    spec: Partition of the global array over ("instance", "tensor").

  Returns:
    The global array, made of the same buffers.
  """
  num_instances = mesh.shape[INSTANCE_AXIS]
  shape = tuple(
    size * num_instances if INSTANCE_AXIS in _axes(spec, dim) else size
    for dim, size in enumerate(rows[0].shape)
  )
  buffers = [shard.data for row in rows for shard in row.addressable_shards]
  return jax.make_array_from_single_device_arrays(
    shape, NamedSharding(mesh, spec), buffers
  )


def _axes(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
  """Mesh axes that shard dimension `dim`."""
  if dim >= len(spec) or spec[dim] is None:
    return ()
  axes = spec[dim]
  return axes if isinstance(axes, tuple) else (axes,)
