"""Small arrays that go to each instance's devices together.

A transfer costs tens of microseconds however small it is, and a step has a
dozen arrays of a few hundred bytes. So they travel as the words of one array,
which programs take as an argument and take apart. XLA gives kernels a part as
it lies there, not a copy, so each begins where kernels want their operands to.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from infinite_llm.cache.host_words import put_words
from infinite_llm.cache.rows import join_rows
from infinite_llm.types import INSTANCE_AXIS

_ALIGNED_WORDS = 64  # Mosaic GPU kernels refuse operands off 256 bytes.
_FEWEST_WORDS = 1024  # Of all arrays, so that few sizes are compiled for.


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the words of a tree are to be read.

  Attributes:
    tree: Its structure.
    leaves: Shape and dtype of each leaf, in order.
  """

  tree: jax.tree_util.PyTreeDef
  leaves: tuple[tuple[tuple[int, ...], str], ...]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class PackedRows[Tree]:
  """A tree of each instance, as an argument of a program over them.

  Attributes:
    words: `[I, W]` int32, sharded over "instance".
    layout: What they are; static, so that another layout is another program.
  """

  words: Any
  layout: Layout

  def tree_flatten(self) -> tuple[tuple[Any], Layout]:
    """As JAX wants it: the layout is not traced."""
    return (self.words,), self.layout

  @classmethod
  def tree_unflatten(
    cls, layout: Layout, children: tuple[Any]
  ) -> "PackedRows[Tree]":
    """Inverse of `tree_flatten`."""
    return cls(children[0], layout)

  def own(self) -> Tree:
    """Inside `shard_map`, where `I` is 1: the tree of this instance."""
    words, at, leaves = self.words[0], 0, []
    for shape, dtype in self.layout.leaves:
      size = math.prod(shape)
      part = words[at : at + size].reshape(shape)
      if dtype == "bool":
        leaves.append(part != 0)
      else:
        leaves.append(jax.lax.bitcast_convert_type(part, dtype))
      at += _aligned(size)
    return jax.tree.unflatten(self.layout.tree, leaves)


def pack[Tree](tree: Tree) -> PackedRows[Tree]:
  """Packs the tree of one instance, `[1, W]` words in host memory.

  W is a power of two: programs that fetch words are one for each W.

  Args:
    tree: Tree of numpy arrays or numbers, of 32 bits each or bool.

  Raises:
    TypeError: If a leaf has another dtype.
  """
  leaves, structure = jax.tree.flatten(tree)
  leaves = [np.asarray(leaf) for leaf in leaves]
  parts = [_words(leaf) for leaf in leaves]
  size = sum(part.size for part in parts)
  width = max(1 << (size - 1).bit_length(), _FEWEST_WORDS)
  words = np.concatenate([*parts, np.zeros(width - size, np.int32)])
  described = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
  return PackedRows(words[None], Layout(structure, described))


def place_rows[Tree](
  trees: Sequence[Tree], mesh: Mesh, rows: Sequence[Mesh]
) -> PackedRows[Tree]:
  """Puts one host tree per instance where its own devices have it.

  Args:
    trees: As for `pack`, equal but for their numbers; one for each instance of
      this process.
    mesh: The mesh of the program that will read them.
    rows: The `(1, tensor)` meshes of the same instances.

  Returns:
    All of them, as one argument of a program over the mesh.
  """
  spec = PartitionSpec(INSTANCE_AXIS)
  packed = [pack(tree) for tree in trees]
  words = [
    put_words(mine.words, row) for mine, row in zip(packed, rows, strict=True)
  ]
  return PackedRows(join_rows(words, mesh, spec), packed[0].layout)


def _aligned(size: int) -> int:
  """Words that a leaf of so many takes up."""
  return -(-size // _ALIGNED_WORDS) * _ALIGNED_WORDS


def _words(leaf: np.ndarray) -> np.ndarray:
  """`[n]` int32 of the same bits, and padding; 0 and 1 for bool."""
  if leaf.dtype == bool:
    leaf = leaf.astype(np.int32)
  if leaf.dtype.itemsize != 4:
    raise TypeError(f"Leaves must have 32 bits or be bool; got {leaf.dtype}.")
  words = np.zeros(_aligned(leaf.size), np.int32)
  words[: leaf.size] = np.ascontiguousarray(leaf).reshape(-1).view(np.int32)
  return words
