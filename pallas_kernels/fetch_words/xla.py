"""fetch_words as a transfer, by XLA."""

import jax


def fetch(words: jax.Array) -> jax.Array:
  """Copies words; the contract is that of `api.fetch_words`."""
  if jax.typeof(words).memory_space is jax.memory.Space.Device:
    return words
  return jax.device_put(words, jax.memory.Space.Device)
