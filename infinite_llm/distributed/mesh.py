"""The one place that builds meshes.

Axes are `("instance", "tensor")`: a row is one model replica with its own
rBlock pool, a column its tensor-parallel shards (`DESIGN.md` section 3).
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from infinite_llm.errors import ConfigError
from infinite_llm.types import INSTANCE_AXIS, TENSOR_AXIS, InstanceId


def _mesh(devices: np.ndarray) -> Mesh:
  # `jax.make_mesh` would give Explicit axes, and may reorder the devices.
  return Mesh(
    devices,
    (INSTANCE_AXIS, TENSOR_AXIS),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )


def make_mesh(
  num_instances: int,
  tensor_parallel: int,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Arranges devices as instances x tensor-parallel shards.

  Neighbouring devices share a row, so the shards of one instance stay inside
  one host wherever its devices are listed together.

  Args:
    num_instances: Rows of the mesh.
    tensor_parallel: Devices of each row.
    devices: Devices to use, in order; None takes all. Those beyond the needed
      ones stay unused.

  Returns:
    A `(num_instances, tensor_parallel)` mesh with axes "instance", "tensor".

  Raises:
    ConfigError: If a count is not positive or there are too few devices.
  """
  for name, value in (
    ("num_instances", num_instances),
    ("tensor_parallel", tensor_parallel),
  ):
    if value < 1:
      raise ConfigError(f"{name} must be at least 1; got {value}.")
  devices = list(jax.devices() if devices is None else devices)
  needed = num_instances * tensor_parallel
  if needed > len(devices):
    raise ConfigError(
      "num_instances x tensor_parallel must not exceed the number of devices; "
      f"got {num_instances} x {tensor_parallel} = {needed} with "
      f"{len(devices)} devices."
    )
  grid = np.empty(needed, dtype=object)
  grid[:] = devices[:needed]
  return _mesh(grid.reshape(num_instances, tensor_parallel))


def own_instances(mesh: Mesh) -> range:
  """The instances of this process: rows of the mesh whose devices it has.

  Args:
    mesh: A mesh from `make_mesh`.

  Returns:
    Their numbers, one after another.

  Raises:
    ConfigError: If an instance would lie in two processes, or none in this one.
  """
  me = jax.process_index()
  owners = [{d.process_index for d in row} for row in mesh.devices]
  for instance, processes in enumerate(owners):
    if len(processes) > 1:
      raise ConfigError(
        "tensor_parallel must divide each process's devices, so that no"
        f" instance lies in two; instance {instance} would lie in"
        f" {sorted(processes)}."
      )
  mine = [i for i, processes in enumerate(owners) if processes == {me}]
  if not mine or mine != list(range(mine[0], mine[-1] + 1)):
    raise ConfigError(
      "num_instances must be such that every process has some, one after"
      f" another; process {me} has {mine} of {len(owners)}."
    )
  return range(mine[0], mine[-1] + 1)


def row_mesh(mesh: Mesh, instance: InstanceId) -> Mesh:
  """Gives one instance's own row, for its local programs.

  Args:
    mesh: A mesh from `make_mesh`.
    instance: Row of `mesh`, from 0.

  Returns:
    A `(1, tensor_parallel)` mesh with the same axes over the same devices.

  Raises:
    ConfigError: If `mesh` has no such row.
  """
  num_instances = mesh.shape[INSTANCE_AXIS]
  if not 0 <= instance < num_instances:
    raise ConfigError(
      f"instance must be in [0, {num_instances}); got {instance}."
    )
  return _mesh(mesh.devices[instance : instance + 1])
