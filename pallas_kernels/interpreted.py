"""Results of kernels that may have been interpreted."""

from typing import Any

import jax


def settled[Tree](results: Tree, interpret: Any) -> Tree:
  """Waits for what an interpreted kernel gives; does nothing to others.

  JAX's interpreter runs operations of its own while the kernel runs. A device
  takes operations in order: one that the caller sends meanwhile waits for the
  kernel, and the interpreter's behind it for that one, for ever.

  Args:
    results: What the kernel's program returned.
    interpret: The kernel's argument; None where it is compiled.

  Returns:
    The results.
  """
  return results if interpret is None else jax.block_until_ready(results)
