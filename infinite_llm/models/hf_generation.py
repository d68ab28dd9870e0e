"""Reads what a Hugging Face folder says beside the weights.

That is its tokenizer, which tokens begin and end a text, how a conversation is
framed, and how its makers sample.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from infinite_llm.errors import CheckpointError
from infinite_llm.models.loaded_model import GenerationDefaults
from infinite_llm.models.model_files import read_json, read_text
from infinite_llm.sampling_params import SamplingParams

_GENERATION_FILE = "generation_config.json"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def read_tokenizer(folder: pathlib.Path) -> Tokenizer | None:
  """Reads `tokenizer.json`, if there is one.

  Raises:
    CheckpointError: If it is no tokenizer.
  """
  file = folder / "tokenizer.json"
  if not file.is_file():
    return None
  try:
    return Tokenizer.from_file(str(file))
  # The binding raises bare `Exception` whatever is wrong with the file.
  except Exception as error:
    raise CheckpointError(f"{file} is not a tokenizer: {error}.") from error


def read_generation(
  folder: pathlib.Path,
  hf_config: Mapping[str, Any],
  tokenizer: Tokenizer | None,
) -> GenerationDefaults:
  """Reads what `transformers` would use; the more specific file wins.

  Args:
    folder: Has `generation_config.json`, `tokenizer_config.json` and
      `chat_template.jinja`, or some of them.
    hf_config: The parsed `config.json`.
    tokenizer: The model's.

  Returns:
    Defaults for generation.

  Raises:
    CheckpointError: If a file is unreadable or a value has a wrong type.
  """
  generation = _read_optional_json(folder / _GENERATION_FILE)
  texts = _read_optional_json(folder / _TOKENIZER_CONFIG_FILE)
  bos_token, eos_token = (
    _token_text(folder, name, texts.get(name))
    for name in ("bos_token", "eos_token")
  )

  def token_ids(name: str, text: str | None) -> tuple[int, ...]:
    for file_name, source in (
      (_GENERATION_FILE, generation),
      ("config.json", hf_config),
    ):
      value = source.get(name)
      if value is not None:
        return _as_token_ids(folder / file_name, name, value)
    if tokenizer is None or text is None:
      return ()
    token = tokenizer.token_to_id(text)
    return () if token is None else (token,)

  bos_token_ids = token_ids("bos_token_id", bos_token)
  return GenerationDefaults(
    eos_token_ids=token_ids("eos_token_id", eos_token),
    bos_token_id=bos_token_ids[0] if bos_token_ids else None,
    bos_token=bos_token,
    eos_token=eos_token,
    chat_template=_read_chat_template(folder, texts.get("chat_template")),
    sampling=_sampling(folder / _GENERATION_FILE, generation),
  )


def _read_optional_json(file: pathlib.Path) -> dict[str, Any]:
  return read_json(file) if file.is_file() else {}


def _as_token_ids(
  file: pathlib.Path, name: str, value: object
) -> tuple[int, ...]:
  ids = value if isinstance(value, list) else [value]
  # A bool is an int in Python, but no token.
  if not all(type(token) is int and token >= 0 for token in ids):
    raise CheckpointError(
      f"{file}: {name} must be a token id or a list of them; got {value!r}."
    )
  return tuple(ids)


def _token_text(folder: pathlib.Path, name: str, token: object) -> str | None:
  """Special tokens are written as text or as an object with a content."""
  text = token.get("content") if isinstance(token, Mapping) else token
  is_none = token is None
  if not is_none and not isinstance(text, str):
    raise CheckpointError(
      f"{folder / _TOKENIZER_CONFIG_FILE}: {name} must be a text or an object"
      f" with a content; got {token!r}."
    )
  return text


def _read_chat_template(folder: pathlib.Path, inline: object) -> str | None:
  file = folder / "chat_template.jinja"
  if file.is_file():
    return read_text(file)
  named = inline
  if not isinstance(inline, list):
    named = [] if inline is None else [{"name": "default", "template": inline}]
  templates = {}
  for entry in named:
    entry = entry if isinstance(entry, Mapping) else {}
    name, template = entry.get("name"), entry.get("template")
    if not isinstance(name, str) or not isinstance(template, str):
      raise CheckpointError(
        f"{folder / _TOKENIZER_CONFIG_FILE}: chat_template must be a text or a"
        f" list of objects with name and template; got {inline!r}."
      )
    templates[name] = template
  return templates.get("default")


def _sampling(
  file: pathlib.Path, generation: Mapping[str, Any]
) -> SamplingParams:
  """How the makers sample; they are greedy unless `do_sample` says otherwise.

  A field that is left out changes nothing, as in vLLM: `transformers` would
  take the 50 most likely tokens.
  """
  do_sample = generation.get("do_sample")
  if not isinstance(do_sample, bool | None):
    raise CheckpointError(
      f"{file}: do_sample must be true or false; got {do_sample!r}."
    )
  names = ["repetition_penalty"]
  options = {}
  if do_sample:
    names += _SAMPLING
    options["temperature"] = 1.0
  options |= {n: generation[n] for n in names if generation.get(n) is not None}
  if generation.get("max_new_tokens") is not None:
    options["max_tokens"] = generation["max_new_tokens"]
  try:
    return SamplingParams(**options)
  except ValueError as error:
    raise CheckpointError(f"{file}: {error}") from error
