"""fetch_words for Hopper GPUs, as a Mosaic GPU kernel.

Each thread loads a word of host memory as it would one of its own: pinned
memory has an address on the device too. Only plain loads are allowed there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128  # Of a warpgroup; each fetches a word.


def fetch(words: jax.Array, *, interpret: Any = None) -> jax.Array:
  """Copies words; the contract is that of `api.fetch_words`.

  Args:
    words: `[M, W]` int32, where W is a multiple of 128.
    interpret: Parameters of interpret mode; None compiles.

  Returns:
    `[M, W]` int32.

  Raises:
    NotImplementedError: If the call is not covered; names the argument.
  """
  count, width = words.shape
  if width % _THREADS:
    raise NotImplementedError(
      f"words: rows in multiples of {_THREADS} words; got {width}."
    )

  if not words.size:
    return jnp.zeros_like(words)

  def run(source: Any, out: Any) -> None:
    row = lax.axis_index("row")
    piece = pl.ds(lax.axis_index("piece") * _THREADS, _THREADS)
    out[row, piece] = plgpu.load(
      source.at[row, piece],
      layout=plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1),
      optimized=False,
    )

  return plgpu.kernel(
    run,
    out_type=jax.ShapeDtypeStruct(words.shape, words.dtype),
    grid=(count, width // _THREADS),
    grid_names=("row", "piece"),
    compiler_params=plgpu.CompilerParams(
      # Threads share nothing.
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    kernel_name="fetch_words",
    interpret=interpret,
  )(words)
