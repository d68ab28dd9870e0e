import jax
import pytest
from jax.sharding import AxisType

from infinite_llm.distributed import mesh as mesh_lib
from infinite_llm.errors import ConfigError


def test_rows_are_instances_and_columns_their_shards():
  mesh = mesh_lib.make_mesh(2, 2)

  assert mesh.axis_names == ("instance", "tensor")
  assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
  assert mesh.devices.tolist() == [jax.devices()[:2], jax.devices()[2:4]]


def test_devices_beyond_the_needed_ones_stay_unused():
  mesh = mesh_lib.make_mesh(3, 1)

  assert mesh.devices.ravel().tolist() == jax.devices()[:3]


def test_the_given_order_of_devices_is_kept():
  devices = jax.devices()[:4][::-1]

  assert mesh_lib.make_mesh(1, 4, devices).devices.tolist() == [devices]


def test_more_instances_than_devices_are_refused_with_both_numbers():
  with pytest.raises(ConfigError, match=r"4 x 2 = 8 with 3 devices"):
    mesh_lib.make_mesh(4, 2, jax.devices()[:3])


@pytest.mark.parametrize(
  ("instances", "tensor", "message"),
  [
    (0, 1, r"num_instances must be at least 1; got 0\."),
    (1, -1, r"tensor_parallel must be at least 1; got -1\."),
  ],
)
def test_counts_below_one_are_refused(instances, tensor, message):
  with pytest.raises(ConfigError, match=message):
    mesh_lib.make_mesh(instances, tensor)


def test_a_row_is_a_mesh_of_that_instance_alone():
  mesh = mesh_lib.make_mesh(2, 2)

  row = mesh_lib.row_mesh(mesh, 1)

  assert dict(row.shape) == {"instance": 1, "tensor": 2}
  assert row.devices.tolist() == [mesh.devices[1].tolist()]
  assert row.axis_types == mesh.axis_types


@pytest.mark.parametrize("instance", [-1, 2])
def test_a_row_that_does_not_exist_is_refused(instance):
  mesh = mesh_lib.make_mesh(2, 2)

  with pytest.raises(ConfigError, match=rf"\[0, 2\); got {instance}\."):
    mesh_lib.row_mesh(mesh, instance)
