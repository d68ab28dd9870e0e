"""The call of fetch_words, checked, whoever answers it."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.fetch_words import mosaic_gpu, xla
from pallas_kernels.pool_layout import require, require_int32

__all__ = ["IMPLEMENTATIONS", "fetch_words"]

IMPLEMENTATIONS = dispatch.Implementations(
  "fetch_words",
  {
    "mosaic_gpu": dispatch.on_gpu(mosaic_gpu.fetch),
    "xla": xla.fetch,
  },
)


def fetch_words(
  words: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Copies words to the memory of the device, wherever they are.

  On a GPU a kernel reads them over the host link. Transfers by the copy engines
  wait for each other, and a few KB behind many MB hold up all that needs them;
  what a kernel reads passes them by.

  Args:
    words: `[M, W]` int32, in pinned host memory or in the device's.
    implementation: Name of the implementation; None is the first that covers
      the call.

  Returns:
    `[M, W]` int32 in the memory of the device.

  Raises:
    ValueError: If an argument is wrong; the message names argument, rule and
      value.
    NotImplementedError: If the named implementation does not cover the call.
  """
  require(words.ndim == 2, "words", "[M, W]", list(words.shape))
  require_int32("words", words)
  return IMPLEMENTATIONS.call(implementation, words)
