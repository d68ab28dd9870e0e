"""Renders conversations with a checkpoint's chat template.

Templates are written for `transformers`, so they get what it gives them: a
sandboxed Jinja whose blocks leave no blank lines, the special tokens by name,
and its few functions.
"""

import datetime
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from infinite_llm.errors import CheckpointError, RequestError
from infinite_llm.models.loaded_model import GenerationDefaults

Message = Mapping[str, Any]
"""One turn: "role", "content", and whatever else the template knows."""

ROLES = (
  "assistant",
  "developer",
  "function",
  "ipython",
  "system",
  "tool",
  "user",
)


class ChatTemplate:
  """A checkpoint's template, ready to render."""

  def __init__(self, generation: GenerationDefaults):
    """Compiles the template.

    Args:
      generation: Has the template and the special tokens that it names.

    Raises:
      RequestError: If the checkpoint has none.
      CheckpointError: If it is not valid Jinja.
    """
    if generation.chat_template is None:
      raise RequestError(
        "The checkpoint has no chat template: give a prompt to generate, not"
        " messages."
      )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
      self._template = environment.from_string(generation.chat_template)
    except jinja2.TemplateSyntaxError as error:
      raise CheckpointError(
        f"The checkpoint's chat template is not valid Jinja: line"
        f" {error.lineno}: {error.message}."
      ) from error
    named = {"bos_token": generation.bos_token}
    named["eos_token"] = generation.eos_token
    # A template may ask whether a token is defined.
    self._tokens = {k: v for k, v in named.items() if v is not None}

  def render(
    self, messages: Sequence[Message], *, add_generation_prompt: bool = True
  ) -> str:
    """Turns a conversation into the text that the model was trained on.

    Args:
      messages: The turns, oldest first.
      add_generation_prompt: Whether the text ends with what begins an answer.

    Returns:
      The text, special tokens included.

    Raises:
      RequestError: If a message is malformed or the template refuses them.
    """
    check_messages(messages)
    try:
      return self._template.render(
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
        **self._tokens,
      )
    # The template is foreign code: it may fail in any way.
    except Exception as error:
      raise RequestError(
        f"The chat template refuses these messages: {error}"
      ) from error


def check_messages(messages: Sequence[Message]) -> None:
  """Refuses what is no conversation.

  Args:
    messages: The turns.

  Raises:
    RequestError: If there are none, or one lacks a role or its content.
  """
  if not messages:
    raise RequestError("messages must have at least one message; got none.")
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise RequestError(
        f"messages[{i}] must be a mapping with role and content; got"
        f" {message!r}."
      )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
      near = difflib.get_close_matches(str(role), ROLES, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise RequestError(
        f"messages[{i}]['role'] must be one of {', '.join(ROLES)}; got"
        f" {role!r}{hint}"
      )
    # A turn that only calls tools has no text.
    if not isinstance(content, str) and "tool_calls" not in message:
      raise RequestError(
        f"messages[{i}]['content'] must be a text; got {content!r}."
      )


def _raise_exception(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  # Jinja's own escapes HTML, which no model was trained on.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
