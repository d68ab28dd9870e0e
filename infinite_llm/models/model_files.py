"""Files of a checkpoint that hold text."""

import json
import pathlib
from typing import Any

from infinite_llm.errors import CheckpointError


def read_text(file: pathlib.Path) -> str:
  """Reads a file of UTF-8 text.

  Raises:
    CheckpointError: If there is no such file, or it cannot be read.
  """
  if not file.is_file():
    raise CheckpointError(f"{file} does not exist.")
  try:
    return file.read_text(encoding="utf-8")
  except (UnicodeDecodeError, OSError) as error:
    raise CheckpointError(f"{file} is not readable UTF-8: {error}.") from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds a JSON object.

  Raises:
    CheckpointError: If it does not, or cannot be read.
  """
  text = read_text(file)
  try:
    content = json.loads(text)
  # Nested too deeply, it is no value error.
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f"{file} is not readable JSON: {error}.") from error
  if not isinstance(content, dict):
    raise CheckpointError(f"{file} must hold a JSON object.")
  return content
