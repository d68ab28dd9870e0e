"""What JAX runs on: asked for by name, and never something else instead."""

import jax

from infinite_llm.errors import ConfigError

PLATFORMS = ("cpu", "gpu")


def choose_platform(platform: str) -> None:
  """Tells JAX what to run on, before it has looked for devices.

  Args:
    platform: One of `PLATFORMS`.

  Raises:
    ConfigError: If it is none of them.
  """
  if platform not in PLATFORMS:
    raise ConfigError(
      f"platform must be one of {', '.join(PLATFORMS)}; got {platform!r}."
    )
  if platform == "cpu":
    jax.config.update("jax_platforms", "cpu")


def check_platform(platform: str) -> None:
  """Has JAX look for devices: they must be of the platform that was chosen.

  Raises:
    ConfigError: If they are others, as where no GPU is found.
  """
  found = jax.default_backend()
  if found != platform:
    raise ConfigError(
      f"platform must be what JAX runs on, {found}; got {platform!r}."
    )
