"""A long text with pass keys hidden in it, and the question that asks for them.

The needles form a chain: each tells its pass key and names the next one, which
may lie anywhere, so that one answer proves the whole text to be there:

    The pass key of #amber is 481093; next is @cobalt.
    ...
    The pass key of #cobalt is 772201; that is all.
    ...
    The pass keys in turn: @amber

to which the needle checkpoint (`infinite_llm.models.needle`) answers
` is 481093; next is @cobalt is 772201; that is all`.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np
import tokenizers

from experiments.filler_text import encode, fill, read_text
from infinite_llm.errors import ConfigError
from infinite_llm.models import needle_tokenizer
from infinite_llm.models.needle_tokenizer import (
  BOS_TOKEN,
  END,
  EOS_TOKEN,
  LINK,
  NAMES,
)

_ANSWER_PATTERN = re.compile(r" is ([1-9][0-9]{5})(?=; )")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
  """One sentence with a pass key.

  Attributes:
    name: What the key belongs to.
    pass_key: Six digits, the first not 0.
    span: Positions of the sentence's tokens in the document.
    answer_span: Those of its tokens that become part of the answer.
    depth: Where the sentence begins, as a fraction of the document.
  """

  name: str
  pass_key: str
  span: range
  answer_span: range
  depth: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A text with needles, a question, and the right answer.

  Attributes:
    token_ids: The text, from the beginning-of-text token on.
    needles: In the order of the answer.
    question_ids: What follows the text in the prompt.
    answer_ids: What greedy decoding gives, with the end-of-text token.
    answer: The same as text, without the end-of-text token.
  """

  token_ids: tuple[int, ...]
  needles: tuple[Needle, ...]
  question_ids: tuple[int, ...]
  answer_ids: tuple[int, ...]
  answer: str

  @property
  def prompt_ids(self) -> tuple[int, ...]:
    """Text and question."""
    return self.token_ids + self.question_ids

  @property
  def pass_keys(self) -> tuple[str, ...]:
    """What `read_answer` finds in a right answer."""
    return tuple(needle.pass_key for needle in self.needles)


def make_document(
  tokenizer: tokenizers.Tokenizer,
  *,
  num_tokens: int = 65536,
  num_needles: int = 4,
  depths: Sequence[float] | None = None,
  path: str | os.PathLike[str] | None = None,
  snap_tokens: int = 32,
  seed: int = 0,
) -> Document:
  """Hides a chain of pass keys in a text.

  Args:
    tokenizer: Tokenizer of a needle checkpoint.
    num_tokens: Length of the document, exactly; the question comes on top.
    num_needles: How many, at most as many as there are `NAMES`.
    depths: Where each begins, in [0, 1]; None spreads them evenly. Which
      comes when in the chain is drawn. Needles that would overlap are moved
      apart.
    path: UTF-8 file with the text, repeated or cut to length; None takes the
      topic texts that ship with CPython.
    snap_tokens: How far a needle may be moved so that it begins a line.
    seed: Seed of the chain, its names and its keys.

  Returns:
    The document. Its pass keys, names and the pairs of tokens that lead from
    one to the next occur nowhere else in it.

  Raises:
    ConfigError: An argument is out of range, the file is not a UTF-8 text, or
      the text leaves no room, no free names or no free keys.
  """
  _require(
    1 <= num_needles <= len(NAMES),
    "num_needles",
    f"in [1, {len(NAMES)}]",
    num_needles,
  )
  _require(snap_tokens >= 0, "snap_tokens", "not negative", snap_tokens)
  _require(seed >= 0, "seed", "not negative", seed)
  if depths is None:
    depths = [(n + 0.5) / num_needles for n in range(num_needles)]
  _require(
    len(depths) == num_needles and all(0 <= depth <= 1 for depth in depths),
    "depths",
    f"num_needles ({num_needles}) fractions in [0, 1]",
    tuple(depths),
  )
  text = needle_tokenizer.default_corpus() if path is None else read_text(path)
  return _hide(
    tokenizer,
    text,
    num_tokens=num_tokens,
    depths=depths,
    snap_tokens=snap_tokens,
    rng=np.random.default_rng(seed),
  )


def make_short_prompt(
  tokenizer: tokenizers.Tokenizer, *, num_tokens: int = 256, seed: int = 0
) -> Document:
  """Hides one pass key in a short piece of CPython's topic texts.

  Args:
    tokenizer: Tokenizer of a needle checkpoint.
    num_tokens: Length of the piece, exactly; the question comes on top.
    seed: Draws the piece, the key, its name and its depth.

  Returns:
    The piece as a document of one needle.

  Raises:
    ConfigError: `num_tokens` is too small for a needle.
  """
  rng = np.random.default_rng(seed)
  text = needle_tokenizer.default_corpus()
  line = text.find("\n", rng.integers(len(text))) + 1
  return _hide(
    tokenizer,
    text[line:] + text[:line],
    num_tokens=num_tokens,
    depths=[rng.random()],
    snap_tokens=32,
    rng=rng,
  )


def read_answer(text: str) -> tuple[str, ...]:
  """Returns the pass keys that a generated text tells, in order."""
  return tuple(_ANSWER_PATTERN.findall(text))


def _hide(
  tokenizer: tokenizers.Tokenizer,
  text: str,
  *,
  num_tokens: int,
  depths: Sequence[float],
  snap_tokens: int,
  rng: np.random.Generator,
) -> Document:
  """Makes the document; needle n of the chain gets a depth by lot."""
  _check_markers(tokenizer)
  count = len(depths)
  # Names and keys are single tokens; only the last needle is one shorter.
  longest = len(encode(tokenizer, _sentence(NAMES[0], "100000", NAMES[0])))
  least = 1 + count * longest
  _require(
    num_tokens >= least,
    "num_tokens",
    f"at least {least} to hold {count} needles",
    num_tokens,
  )
  filler = fill(tokenizer, text, num_tokens)
  names = _free_names(tokenizer, filler, count, rng)
  keys = _free_keys(tokenizer, filler, count, rng)

  sentences = [
    encode(tokenizer, _sentence(name, key, after))
    for name, key, after in zip(names, keys, [*names[1:], None], strict=True)
  ]
  filler = filler[: num_tokens - 1 - sum(map(len, sentences))]

  # Chain number of the needle at each depth, from the shallowest.
  chain = rng.permutation(count)
  offsets = _offsets(
    tokenizer,
    filler,
    [len(sentences[n]) for n in chain],
    sorted(depths),
    snap_tokens,
  )
  token_ids = [tokenizer.token_to_id(BOS_TOKEN)]
  needles: list[Needle | None] = [None] * count
  done = 0
  for n, offset in zip(chain, offsets, strict=True):
    token_ids += filler[done:offset].tolist()
    done = offset
    start = len(token_ids)
    token_ids += sentences[n]
    marker = tokenizer.token_to_id(needle_tokenizer.definition(names[n]))
    first = start + sentences[n].index(marker) + 1
    # Two halves of the key among two phrases, then the next name if any.
    told = 5 if n + 1 < count else 4
    needles[n] = Needle(
      name=names[n],
      pass_key=keys[n],
      span=range(start, len(token_ids)),
      answer_span=range(first, first + told),
      depth=start / num_tokens,
    )
  token_ids += filler[done:].tolist()

  # A right answer repeats what the needles say, and ends there.
  answer_ids = [token_ids[n] for needle in needles for n in needle.answer_span]
  question = f"\nThe pass keys in turn: {needle_tokenizer.reference(names[0])}"
  return Document(
    token_ids=tuple(token_ids),
    needles=tuple(needles),
    question_ids=tuple(encode(tokenizer, question)),
    answer_ids=(*answer_ids, tokenizer.token_to_id(EOS_TOKEN)),
    answer=tokenizer.decode(answer_ids),
  )


def _require(holds: bool, name: str, rule: str, value: object) -> None:
  if not holds:
    raise ConfigError(f"{name} must be {rule}; got {value!r}.")


def _sentence(name: str, pass_key: str, after: str | None) -> str:
  marker = needle_tokenizer.definition(name)
  if after is None:
    return f"\nThe pass key of {marker} is {pass_key}{END}.\n"
  reference = needle_tokenizer.reference(after)
  return f"\nThe pass key of {marker} is {pass_key}{LINK} {reference}.\n"


def _markers(name: str) -> tuple[str, str, str]:
  reference = needle_tokenizer.reference(name)
  return needle_tokenizer.definition(name), reference, f" {reference}"


def _check_markers(tokenizer: tokenizers.Tokenizer) -> None:
  names = [marker for name in NAMES for marker in _markers(name)]
  for marker in (BOS_TOKEN, EOS_TOKEN, LINK, END, *names):
    if tokenizer.token_to_id(marker) is None:
      raise ConfigError(
        "tokenizer must be that of a needle checkpoint;"
        f" it has no token {marker!r}."
      )


def _free_names(
  tokenizer: tokenizers.Tokenizer,
  filler: np.ndarray,
  count: int,
  rng: np.random.Generator,
) -> list[str]:
  """Draws names that the text does not use as markers."""
  used = set(np.unique(filler).tolist())
  free = [
    name
    for name in NAMES
    if used.isdisjoint(map(tokenizer.token_to_id, _markers(name)))
  ]
  if len(free) < count:
    raise ConfigError(
      f"num_needles must be at most the number of free names; got {count},"
      f" but the text uses all names but {len(free)} as #name or @name."
    )
  return [free[n] for n in rng.permutation(len(free))[:count]]


def _free_keys(
  tokenizer: tokenizers.Tokenizer,
  filler: np.ndarray,
  count: int,
  rng: np.random.Generator,
) -> list[str]:
  """Draws pass keys that share no half and no pair of tokens with the text.

  The checkpoint goes by the last two tokens, so what leads from a name through
  its key to the next name must be said once only.
  """
  vocab_size = tokenizer.get_vocab_size()
  pairs = np.unique(filler[:-1] * vocab_size + filler[1:])

  def is_free(first: int, second: int) -> bool:
    pair = first * vocab_size + second
    at = np.searchsorted(pairs, pair)
    return at == len(pairs) or pairs[at] != pair

  verb = encode(tokenizer, " is")[0]
  link, end = tokenizer.token_to_id(LINK), tokenizer.token_to_id(END)
  keys = []
  for high, low in zip(
    rng.permutation(np.arange(100, 1000)), rng.permutation(1000), strict=False
  ):
    first, second = encode(tokenizer, f" {high}{low:03}")
    if (
      is_free(verb, first)
      and is_free(first, second)
      and is_free(second, link)
      and is_free(second, end)
    ):
      keys.append(f"{high}{low:03}")
    if len(keys) == count:
      return keys
  raise ConfigError(
    f"num_needles must be at most the number of free pass keys; got {count},"
    f" but the text leaves only {len(keys)}."
  )


def _offsets(
  tokenizer: tokenizers.Tokenizer,
  filler: np.ndarray,
  lengths: Sequence[int],
  depths: Sequence[float],
  snap_tokens: int,
) -> list[int]:
  """Returns before which filler token each needle goes, never falling."""
  ends_line = np.array(
    [
      (tokenizer.id_to_token(n) or "").endswith("Ċ")  # A newline's byte.
      for n in range(tokenizer.get_vocab_size())
    ]
  )
  begins_line = np.concatenate([[True], ends_line[filler]])
  num_tokens = 1 + len(filler) + sum(lengths)
  offsets = []
  floor = before = 0  # Filler tokens and needle tokens already placed.
  for length, depth in zip(lengths, depths, strict=True):
    offset = round(depth * num_tokens) - 1 - before
    offset = min(max(offset, floor), len(filler))
    low, high = max(offset - snap_tokens, floor), offset + snap_tokens + 1
    near = low + np.flatnonzero(begins_line[low:high])
    if snap_tokens and len(near):
      offset = int(near[np.abs(near - offset).argmin()])
    offsets.append(offset)
    floor = offset
    before += length
  return offsets
