"""Which implementation answers a call."""

import logging

import jax
import pytest

from pallas_kernels.dispatch import (
  Implementations,
  OtherBackendError,
  on_gpu,
)


def _covers_small(x):
  """Stands for a kernel that covers some calls only."""
  if x < 0:
    raise ValueError(f"x must be at least 0; got {x}.")
  if x > 10:
    raise NotImplementedError(f"x: more than 10; got {x}.")
  return "small"


def _covers_medium(x):
  if x > 100:
    raise NotImplementedError(f"x: more than 100; got {x}.")
  return "medium"


def _implementations(kernel: str) -> Implementations:
  return Implementations(
    kernel, {"small": _covers_small, "medium": _covers_medium}
  )


def test_the_preferred_implementation_answers_silently(caplog):
  assert _implementations("silent").call(None, 5) == "small"
  assert not caplog.records


def test_the_next_one_answers_and_the_reason_is_logged_once(caplog):
  implementations = _implementations("logged")
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      assert implementations.call(None, 50) == "medium"
  [record] = caplog.records
  assert record.getMessage() == (
    "logged: taking 'medium', because 'small' does not cover the call:"
    " x: more than 10; got 50."
  )


def test_one_for_another_backend_is_passed_over_silently(caplog):
  def elsewhere(x):
    raise OtherBackendError(f"default backend: none of ours; got {x}.")

  implementations = Implementations(
    "elsewhere", {"elsewhere": elsewhere, "small": _covers_small}
  )
  assert implementations.call(None, 5) == "small"
  assert not caplog.records
  with pytest.raises(NotImplementedError, match="none of ours"):
    implementations.call("elsewhere", 5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="Has a GPU.")
def test_a_gpu_kernel_is_for_another_backend_than_the_cpu():
  with pytest.raises(OtherBackendError, match="a GPU kernel; got cpu"):
    on_gpu(_covers_small)(5)


@pytest.mark.gpu
def test_a_gpu_kernel_answers_on_a_gpu():
  assert on_gpu(_covers_small)(5) == "small"


def test_one_that_answers_to_its_name_only_is_never_a_fallback(caplog):
  implementations = Implementations(
    "requested", {"small": _covers_small}, {"medium": _covers_medium}
  )
  assert implementations.names == ("small", "medium")
  assert implementations.call("medium", 50) == "medium"
  with pytest.raises(NotImplementedError, match=r"\(small: x: [^;]*; got 50"):
    implementations.call(None, 50)
  assert not caplog.records


def test_one_asked_for_by_name_never_falls_back():
  with pytest.raises(NotImplementedError, match="x: more than 10; got 50"):
    _implementations("named").call("small", 50)


def test_one_may_be_asked_for_though_another_is_preferred(caplog):
  assert _implementations("other").call("medium", 5) == "medium"
  assert not caplog.records


def test_a_wrong_call_is_wrong_for_everybody():
  with pytest.raises(ValueError, match="x must be at least 0; got -1"):
    _implementations("wrong").call(None, -1)


def test_a_call_that_nobody_covers_says_why():
  with pytest.raises(NotImplementedError, match=r"small: x: .*; medium: x: "):
    _implementations("uncovered").call(None, 500)


def test_an_unknown_name_is_a_wrong_call():
  with pytest.raises(ValueError, match="one of small, medium; got 'large'"):
    _implementations("unknown").call("large", 5)
