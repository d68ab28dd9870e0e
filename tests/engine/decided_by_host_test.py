"""What a program runs is decided by the host, before it launches it.

On a GPU the host itself waits for the predicate of a branch or loop, and so for
all that was launched before, and can launch nothing behind it meanwhile. What
GPU kernels add to steps is looked at in `tests/sm90a`, where they are compiled.
"""

import jax
import pytest
from jax import lax
from jax.extend import core

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.program_cache import ProgramCache
from infinite_llm.models.hf_loader import load_hf
from tests.testing import SMALL_ENGINE, write_shallow_checkpoint

KNOWN = {
  # Which shifts an instance needs is known to its own process alone.
  "group_prefill": {"cond"},
}


def decided_by_devices(jaxpr: core.Jaxpr) -> set[str]:
  """Names of the branches and loops whose predicate is computed.

  A loop of a number of turns that is known when it is traced is a scan.
  """
  found = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("cond", "while"):
      found.add(eqn.primitive.name)
    for inner in jax.tree.leaves(
      eqn.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
    ):
      if isinstance(inner, core.ClosedJaxpr):
        inner = inner.jaxpr
      if isinstance(inner, core.Jaxpr):
        found |= decided_by_devices(inner)
  return found


def _traced(function) -> core.Jaxpr:
  return jax.jit(function).trace(1).jaxpr.jaxpr


@pytest.mark.parametrize(
  ("expected", "function"),
  [
    ({"cond"}, lambda x: lax.cond(x > 0, lambda: x, lambda: -x)),
    ({"cond"}, lambda x: lax.switch(x, [lambda: x, lambda: -x])),
    ({"while"}, lambda x: lax.fori_loop(0, x, lambda _, y: y + 1, x)),
    ({"while"}, lambda x: lax.while_loop(lambda y: y < 5, lambda y: y + 1, x)),
    (
      {"cond"},
      lambda x: lax.map(
        jax.jit(lambda y: lax.cond(y > 0, lambda: y, lambda: -y)), x[None]
      ),
    ),
    (set(), lambda x: lax.fori_loop(0, 5, lambda _, y: y + 1, x)),
  ],
)
def test_branches_and_loops_of_devices_are_noticed(expected, function):
  assert decided_by_devices(
    _traced(lambda x: function(jax.numpy.int32(x)))
  ) == (expected)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_programs_of_an_engine_have_none(kv_dtype, tmp_path, monkeypatch):
  """Of a group with host memory, which has programs of every kind."""
  found = {}
  run = ProgramCache.run

  def trace_and_run(self, key, build, args):
    if key not in self:
      found[key] = decided_by_devices(build().trace(*args).jaxpr.jaxpr)
    return run(self, key, build, args)

  monkeypatch.setattr(ProgramCache, "run", trace_and_run)
  model = load_hf(
    write_shallow_checkpoint(tmp_path), make_mesh(2, 1), dtype="float32"
  )
  options = {
    "num_instances": 2,
    "block_size": 16,
    "num_blocks": 9,
    "host_blocks": 33,
    "host_attention": True,
    "kv_dtype": kv_dtype,
  }
  # Its attention has no loops: the others' are the kernels' own matter.
  engine = Engine(
    model, engine_config(**SMALL_ENGINE | options), attention="reference"
  )
  engine.warm_up()
  assert set(found) == set(engine.runner.programs)
  names = {name for name, *_ in found}
  assert {"local_decode", "sample_cut", "exchange", "layered add"} < names
  assert "layered group front" in names
  for (name, *_), decided in found.items():
    assert decided == KNOWN.get(name, set()), name
