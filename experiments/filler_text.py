"""Text of any length to hide pass keys in."""

import os
import pathlib

import numpy as np
import tokenizers

from infinite_llm.errors import ConfigError


def read_text(path: str | os.PathLike[str]) -> str:
  """Reads a UTF-8 file that is not blank.

  Args:
    path: The file.

  Returns:
    Its text.

  Raises:
    ConfigError: If it cannot be read, is not UTF-8, or is empty.
  """
  shown = repr(os.fspath(path))
  try:
    text = pathlib.Path(path).read_bytes().decode("utf-8")
  except OSError as error:
    raise ConfigError(
      f"path must be a readable file; got {shown} ({error.strerror})."
    ) from error
  except UnicodeDecodeError as error:
    raise ConfigError(
      f"path must be UTF-8 text; {shown} has byte"
      f" 0x{error.object[error.start]:02x} at offset {error.start}"
      f" ({error.reason})."
    ) from error
  if not text.strip():
    raise ConfigError(f"path must hold some text; {shown} is empty.")
  return text


def fill(
  tokenizer: tokenizers.Tokenizer, text: str, num_tokens: int
) -> np.ndarray:
  """Repeats or cuts a text to a number of tokens.

  Args:
    tokenizer: Cuts the text into tokens.
    text: At least one token of it.
    num_tokens: How many are wanted.

  Returns:
    `[num_tokens]` int64 token ids.
  """
  ids: list[int] = []
  text += "\n"
  size = min(16 * num_tokens, 2**20)  # Encode no more than is wanted.
  for start in range(0, len(text), size):
    ids += encode(tokenizer, text[start : start + size])
    if len(ids) >= num_tokens:
      break
  return np.resize(np.array(ids), num_tokens)


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  """Token ids of a text, without any that a template would add."""
  return tokenizer.encode(text, add_special_tokens=False).ids
