import jax
import pytest

from infinite_llm.distributed import meeting, mesh


@pytest.mark.parametrize(("instances", "tensor"), [(1, 1), (4, 1), (2, 2)])
def test_devices_meet_as_instances_and_as_columns(
  instances, tensor, monkeypatch
):
  seen: list[int] = []
  wait = jax.block_until_ready
  monkeypatch.setattr(
    jax, "block_until_ready", lambda x: seen.append(int(wait(x)[0]))
  )

  meeting.meet(mesh.make_mesh(instances, tensor))

  assert seen == [instances]
