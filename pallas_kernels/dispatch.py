"""Chooses which implementation of a kernel answers a call.

Two exceptions carry the choice. An implementation that does not cover a call
raises `NotImplementedError`, naming the argument, and the next one is tried;
`ValueError` means that the call itself is wrong, for everybody. One asked for
by name never falls back.
"""

import functools
import logging
from collections.abc import Callable, Mapping

import jax

_LOGGER = logging.getLogger(__name__)


class OtherBackendError(NotImplementedError):
  """An implementation is for hardware that this process does not use."""


def on_gpu[**Params, Result](
  kernel: Callable[Params, Result],
) -> Callable[Params, Result]:
  """An implementation that runs a kernel where this process has a GPU.

  Which implementation a trace takes is decided while tracing, for the backend
  that the process would run on. Who compiles for another platform calls the
  kernel itself.

  Args:
    kernel: The kernel.

  Returns:
    The kernel, or what raises `OtherBackendError` on other backends.
  """

  @functools.wraps(kernel)
  def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
    backend = jax.default_backend()
    if backend != "gpu":
      raise OtherBackendError(f"default backend: a GPU kernel; got {backend}.")
    return kernel(*args, **kwargs)

  return call


class Implementations[**Params, Result]:
  """The implementations of one kernel, the most preferred first."""

  def __init__(
    self,
    kernel: str,
    by_name: Mapping[str, Callable[Params, Result]],
    by_request: Mapping[str, Callable[Params, Result]] | None = None,
  ):
    """Freezes the implementations and their order.

    Args:
      kernel: Name of the kernel, for messages.
      by_name: Implementations in order of preference.
      by_request: Those that only answer to their names.
    """
    self._kernel = kernel
    self._by_name = dict(by_name)
    self._by_request = dict(by_request or {})

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the implementations, the most preferred first."""
    return (*self._by_name, *self._by_request)

  def call(
    self,
    implementation: str | None,
    *args: Params.args,
    **kwargs: Params.kwargs,
  ) -> Result:
    """Calls one implementation.

    Args:
      implementation: Its name; None takes the first that covers the call, and
        logs, once for each reason, why a preferred one did not; that it is
        for another backend is no news.
      *args: Arguments of the kernel.
      **kwargs: Keyword arguments of the kernel.

    Returns:
      What the implementation returns.

    Raises:
      ValueError: If no implementation has this name, or the call is wrong.
      NotImplementedError: If the named one, or every one, does not cover the
        call.
    """
    if implementation is not None:
      return self._find(implementation)(*args, **kwargs)
    refusals: dict[str, NotImplementedError] = {}
    for name, function in self._by_name.items():
      try:
        result = function(*args, **kwargs)
      except NotImplementedError as error:
        refusals[name] = error
        continue
      for refused, error in refusals.items():
        if not isinstance(error, OtherBackendError):
          _warn_once(self._kernel, name, refused, str(error))
      return result
    reasons = "; ".join(f"{name}: {error}" for name, error in refusals.items())
    raise NotImplementedError(
      f"No implementation of {self._kernel} covers this call ({reasons})."
    )

  def _find(self, name: str) -> Callable[Params, Result]:
    if name not in self.names:
      raise ValueError(
        f"implementation of {self._kernel} must be one of"
        f" {', '.join(self.names)}; got {name!r}."
      )
    return (self._by_name | self._by_request)[name]


@functools.cache
def _warn_once(kernel: str, taken: str, refused: str, reason: str) -> None:
  _LOGGER.warning(
    "%s: taking %r, because %r does not cover the call: %s",
    kernel,
    taken,
    refused,
    reason,
  )
