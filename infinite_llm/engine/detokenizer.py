"""Turns a growing sequence of tokens into text, as far as it is certain."""

from collections.abc import Sequence

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet one."""

_PATIENCE = 8
"""Tokens without a whole character after which bytes are taken for broken.

A character has at most four bytes, so fewer would do if every token had text.
"""

_CONTEXT = 8
"""Most prompt tokens that are decoded in front of the first output token."""


class Detokenizer:
  """Text of one request's output, token by token, up to a stop string.

  What `append` and `finish` return, joined, is the text; nothing is taken back.
  Half a character is held back until its other half comes, and so is text that
  may turn out to be the beginning of a stop string. Where a text ends does not
  depend on how it is cut into tokens: it ends before the stop string that is
  complete first, and of those the longest, or behind it if that is wanted.

  Attributes:
    is_stopped: Whether a stop string has come.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    *,
    stop: Sequence[str] = (),
    include_stop: bool = False,
    skip_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
  ):
    """Starts with no text.

    Args:
      tokenizer: Decodes tokens; ids that it does not know have no text.
      stop: Strings that end the text.
      include_stop: Whether the text ends behind the stop string.
      skip_special_tokens: Leave special tokens out of the text.
      prompt_token_ids: What the output continues. Some decoders drop a space
        at the beginning of a text; with this the output keeps its own.
    """
    self._characters = _Characters(
      tokenizer, skip_special_tokens, prompt_token_ids
    )
    self._stop = tuple(stop)
    self._include_stop = include_stop
    self._held = ""
    self.is_stopped = False

  def append(self, token_id: int) -> str:
    """Takes the next token.

    Args:
      token_id: Its id.

    Returns:
      Text that is certain now and was not before; may be empty, and is once a
      stop string has come.
    """
    if self.is_stopped:
      return ""
    return self._release(self._characters.append(token_id))

  def finish(self) -> str:
    """Ends the text: no more tokens come.

    Returns:
      What was held back; half a character becomes U+FFFD.
    """
    if self.is_stopped:
      return ""
    text = self._release(self._characters.finish())
    rest, self._held = self._held, ""
    return text + rest

  def _release(self, new_text: str) -> str:
    """Returns what of the text held so far and `new_text` is certain."""
    text = self._held + new_text
    found = [
      (start + len(stop), start)
      for stop in self._stop
      if (start := text.find(stop)) >= 0
    ]
    if found:
      self.is_stopped = True
      self._held = ""
      end, start = min(found)
      return text[: end if self._include_stop else start]
    certain = len(text) - max(
      (_overlap(text, stop) for stop in self._stop), default=0
    )
    self._held = text[certain:]
    return text[:certain]


def _overlap(text: str, stop: str) -> int:
  """Longest end of `text` that is a beginning of `stop`, but not all of it."""
  longest = min(len(text), len(stop) - 1)
  return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Characters:
  """Whole characters of a growing sequence of tokens.

  Only a window of tokens is decoded each time: those since the last certain
  character, and as context those before them, back to the one before that. What
  a decoder does at the beginning of a text thus cancels out.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    skip_special_tokens: bool,
    prompt_token_ids: Sequence[int],
  ):
    """Starts behind the prompt."""
    self._tokenizer = tokenizer
    self._skip_special_tokens = skip_special_tokens
    context = self._last_characters(prompt_token_ids)
    is_open = self._decode(context).endswith(_REPLACEMENT)
    self._set_window(context, is_open)

  def append(self, token_id: int) -> str:
    """Takes a token; returns the characters that are complete now."""
    self._window.append(token_id)
    text = self._decode(self._window)
    waiting = self._window[self._num_context :]
    is_open = text.endswith(_REPLACEMENT)
    if is_open and len(waiting) < _PATIENCE:
      return ""
    # Of broken bytes all are certain but the last, which may still go on.
    new_text = text[self._num_characters : len(text) - is_open]
    if new_text:  # Tokens without text would be no context.
      self._set_window(waiting, is_open)
    elif len(waiting) >= 2 * _PATIENCE:
      # However many such tokens come, the window stays small.
      with_text = [token for token in waiting if self._decode([token])]
      self._window[self._num_context :] = with_text[-_PATIENCE:]
    return new_text

  def finish(self) -> str:
    """Returns what the tokens that are left give, complete or not."""
    return self._decode(self._window)[self._num_characters :]

  def _set_window(self, context: list[int], is_open: bool) -> None:
    """Goes on behind `context`; if `is_open`, before its last character."""
    self._window = context
    self._num_context = len(context)
    self._num_characters = len(self._decode(context)) - is_open

  def _last_characters(self, token_ids: Sequence[int]) -> list[int]:
    """The shortest end of the prompt that is made of whole characters."""
    ends = [list(token_ids[-n:]) for n in range(1, _CONTEXT + 1)]
    for end in ends:
      text = self._decode(end)
      if text and _REPLACEMENT not in text:
        return end
    return ends[-1]

  def _decode(self, token_ids: list[int]) -> str:
    return self._tokenizer.decode(
      token_ids, skip_special_tokens=self._skip_special_tokens
    )
