"""Trees of small arrays arrive as they were."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from infinite_llm.cache.packed_rows import pack, place_rows
from infinite_llm.distributed.mesh import make_mesh, row_mesh

TREES = [
  {
    "signed": np.array([[-1, 2**31 - 1]], np.int32),
    "large": np.array([2**32 - 1 - i], np.uint32),
    "real": np.array([0.5, -np.inf, i], np.float32),
    "flags": np.array([True, False, bool(i)]),
    "nothing": (np.zeros(0, np.int32), None),
    "one": np.int32(i),
  }
  for i in range(2)
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_instance_reads_its_own_tree(ranks):
  mesh = make_mesh(2, ranks)
  placed = place_rows(TREES, mesh, [row_mesh(mesh, 0), row_mesh(mesh, 1)])
  spec = PartitionSpec("instance")
  read = jax.jit(
    jax.shard_map(
      lambda packed: jax.tree.map(lambda leaf: leaf[None], packed.own()),
      mesh=mesh,
      in_specs=spec,
      out_specs=spec,
      check_vma=False,
    )
  )(placed)

  assert len(jax.tree.leaves(placed)) == 1
  for i, tree in enumerate(TREES):
    mine = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], read)
    jax.tree.map(np.testing.assert_array_equal, mine, tree)
    assert jax.tree.map(lambda leaf: leaf.dtype, mine) == jax.tree.map(
      lambda leaf: leaf.dtype, tree
    )


def test_each_leaf_begins_where_kernels_want_operands():
  words = pack(TREES[1]).words
  at = {
    name: np.flatnonzero(words[0] == np.asarray(first).view(np.int32))[0]
    for name, first in (
      ("signed", np.int32(-1)),
      ("large", np.uint32(2**32 - 2)),
      ("real", np.float32(0.5)),
    )
  }
  assert len(set(at.values())) == 3
  assert not any(4 * where % 256 for where in at.values())


@pytest.mark.parametrize(("size", "width"), [(1, 1024), (1025, 2048)])
def test_there_are_few_numbers_of_words(size, width):
  assert pack(np.zeros(size, np.int32)).words.shape == (1, width)


def test_another_layout_is_another_program():
  structures = {
    jax.tree.structure(pack(tree))
    for tree in (*TREES, {"one": np.int32(0)}, {"one": np.uint32(0)})
  }
  assert len(structures) == 3


@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_words_have_32_bits(dtype):
  with pytest.raises(TypeError, match=f"must have 32 bits .* got {dtype}"):
    pack(np.zeros(2, dtype))
