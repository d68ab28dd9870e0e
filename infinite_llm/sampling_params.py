"""How the next token of a request is chosen. Plain Python, no JAX."""

import dataclasses
import math
import numbers
import types
from collections.abc import Iterable
from typing import ClassVar, cast

from infinite_llm.types import Text

_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """Sampling of one request; the defaults are greedy with 16 tokens.

  Attributes:
    max_tokens: Most tokens to generate, at least 1.
    temperature: Divides the logits; 0 is greedy.
    top_k: Keep the k most likely tokens; 0 keeps all.
    top_p: Keep the smallest set of tokens whose probability reaches top_p.
    min_p: Keep tokens at least this fraction as likely as the best one.
    repetition_penalty: Divides positive and multiplies negative logits of
      tokens that the prompt or the output already has (CTRL, arXiv
      1909.05858); 1 changes nothing.
    seed: Seed of this request's random numbers; None draws one.
    stop: Strings that end the output.
    stop_token_ids: Tokens that end the output; they are part of its ids.
    include_stop_str_in_output: Whether the text has the stop string or the text
      of the token, end-of-sequence too, that ended it.
    ignore_eos: Go on after the model's end-of-sequence token.
    logprobs: Number of most likely tokens to report at every step beside the
      chosen one; None reports nothing.
    skip_special_tokens: Leave special tokens out of the text.
  """

  max_tokens: int = 16
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int | None = None
  stop: tuple[Text, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  include_stop_str_in_output: bool = False
  ignore_eos: bool = False
  logprobs: int | None = None
  skip_special_tokens: bool = True

  MAX_LOGPROBS: ClassVar[int] = 20

  def __post_init__(self):
    if isinstance(self.stop, str):
      object.__setattr__(self, "stop", (self.stop,))
    self._check_types()
    object.__setattr__(self, "stop", tuple(self.stop))
    object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
    rules = (
      ("max_tokens", self.max_tokens >= 1, "at least 1"),
      (
        "temperature",
        self.temperature >= 0 and math.isfinite(self.temperature),
        "finite and not negative",
      ),
      ("top_k", self.top_k >= 0, "not negative (0 keeps all tokens)"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
      (
        "repetition_penalty",
        self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
        "finite and positive",
      ),
      (
        "seed",
        self.seed is None or 0 <= self.seed < 2**32,
        "None or in [0, 2**32)",
      ),
      ("stop", all(self.stop), "made of non-empty strings"),
      (
        "logprobs",
        self.logprobs is None or 0 <= self.logprobs <= self.MAX_LOGPROBS,
        f"None or in [0, {self.MAX_LOGPROBS}]",
      ),
    )
    for name, holds, rule in rules:
      if not holds:
        raise _wrong(name, rule, getattr(self, name))

  def _check_types(self) -> None:
    """Refuses what would only fail later, in the middle of a step."""
    for names, kind, rule in (
      (("max_tokens", "top_k"), numbers.Integral, "an integer"),
      (
        ("temperature", "top_p", "min_p", "repetition_penalty"),
        numbers.Real,
        "a number",
      ),
      (("seed", "logprobs"), numbers.Integral | None, "None or an integer"),
    ):
      for name in names:
        if not _is(getattr(self, name), kind):
          raise _wrong(name, rule, getattr(self, name))
    for name in _FLAGS:
      # A "no" would count as true.
      if not isinstance(getattr(self, name), bool):
        raise _wrong(name, "True or False", getattr(self, name))
    for name, kind, rule in (
      ("stop", str, "a string or a sequence of them"),
      ("stop_token_ids", numbers.Integral, "a sequence of integers"),
    ):
      value = cast(object, getattr(self, name))
      if not _all_are(value, kind):
        raise _wrong(name, rule, value)

  @property
  def is_greedy(self) -> bool:
    """Whether the most likely token is always taken."""
    return self.temperature == 0


def _is(value: object, kind: type | types.UnionType) -> bool:
  """Whether a value is of a kind; a bool is an int in Python, but no number."""
  return isinstance(value, kind) and not isinstance(value, bool)


def _all_are(items: object, kind: type) -> bool:
  return isinstance(items, Iterable) and all(
    _is(item, kind) for item in cast(Iterable[object], items)
  )


def _wrong(name: str, rule: str, value: object) -> ValueError:
  return ValueError(f"{name} must be {rule}; got {value!r}.")
