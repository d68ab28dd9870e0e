"""A journal of requests: what was accepted, and what became of it.

Whoever accepts requests writes them down first, and what they ended with when
they end. After a crash the journal tells which ones are still owed an answer.
Random numbers hang on a request's seed and position alone, so a replay gives
the tokens that the first try would have given.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.errors import ConfigError, RequestError
from infinite_llm.sampling_params import SamplingParams

_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepted:
  """A request as it was accepted.

  Attributes:
    request_id: Its name, unique in the journal.
    prompt_token_ids: Its prompt.
    sampling: How to choose its tokens; it has a seed, or needs none.
  """

  request_id: str
  prompt_token_ids: tuple[int, ...]
  sampling: SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
  """What a request ended with.

  Attributes:
    request_id: Its name.
    token_ids: Its answer.
    text: Its text.
    finish_reason: As of `RequestOutput`.
    error: What went wrong, if that is the reason.
  """

  request_id: str
  token_ids: tuple[int, ...]
  text: str
  finish_reason: str
  error: str | None


class Journal:
  """An append-only file of JSON lines, read at the start.

  A line is on the disk before a call that writes it returns. A last line that
  was cut short by a crash was never answered for; it is dropped.

  Attributes:
    accepted: All requests, by name, in the order of acceptance.
    ended: Those that ended, by name.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    settings: Mapping[str, str] = MappingProxyType({}),
  ):
    """Opens a journal, or begins one.

    Args:
      path: The file. Nobody else writes to it.
      settings: What all answers in it depend on, by name, such as the model.

    Raises:
      ConfigError: If it cannot be read and written, is no journal, or was begun
        with other settings, of which it names one.
    """
    self._settings = dict(settings)
    self.accepted: dict[str, Accepted] = {}
    self.ended: dict[str, Ended] = {}
    self._path = pathlib.Path(path)
    try:
      size = self._read()
      self._file = self._path.open("ab")
      self._file.truncate(size)
    except OSError as error:
      raise ConfigError(
        f"The journal must be a file that can be read and written; got"
        f" {str(path)!r}: {error.strerror}."
      ) from error
    if not size:
      self._write({"journal": _VERSION, "settings": self._settings})

  @property
  def unfinished(self) -> list[Accepted]:
    """Requests that are owed an answer, in the order of acceptance."""
    return [
      request
      for name, request in self.accepted.items()
      if name not in self.ended
    ]

  def has(self, request: Accepted) -> bool:
    """Whether a request was accepted before.

    Raises:
      RequestError: If another one of that name was.
    """
    before = self.accepted.get(request.request_id)
    if before is None:
      return False
    if _text(before) != _text(request):
      raise RequestError(
        f"request_id must be unique in {str(self._path)!r}, or be that of the"
        f" same prompt and sampling; got another {request.request_id!r}."
      )
    return True

  def accept(self, request: Accepted) -> None:
    """Writes a request down, before anybody is told that it is accepted.

    Raises:
      RequestError: If its name is in the journal already, or its tokens would
        not come again.
    """
    if request.request_id in self.accepted:
      raise RequestError(
        f"request_id must be unique in the journal; got {request.request_id!r}"
        " again."
      )
    if request.sampling.seed is None and not request.sampling.is_greedy:
      raise RequestError(
        f"seed must be set for a replay to give the same tokens; request"
        f" {request.request_id!r} has none."
      )
    self.accepted[request.request_id] = request
    self._write({"accepted": dataclasses.asdict(request)})

  def end(self, output: RequestOutput) -> None:
    """Writes down what a request ended with.

    Raises:
      RequestError: If it was not accepted, has ended before, or goes on.
    """
    name, reason = output.request_id, output.finish_reason
    if name not in self.accepted or name in self.ended or reason is None:
      raise RequestError(
        f"An output must be the last one of an accepted request; got {output}."
      )
    self._end(
      Ended(
        request_id=name,
        token_ids=output.token_ids,
        text=output.text,
        finish_reason=reason,
        error=None if output.error is None else str(output.error),
      )
    )

  def fail(self, request_id: str, error: Exception) -> None:
    """Writes down that an accepted request cannot be run any more."""
    self._end(
      Ended(
        request_id=request_id,
        token_ids=(),
        text="",
        finish_reason="error",
        error=str(error),
      )
    )

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _end(self, ended: Ended) -> None:
    self.ended[ended.request_id] = ended
    self._write({"ended": dataclasses.asdict(ended)})

  def _write(self, line: Mapping[str, Any]) -> None:
    self._file.write(json.dumps(line).encode() + b"\n")
    self._file.flush()
    os.fsync(self._file.fileno())

  def _read(self) -> int:
    """Reads all whole lines; returns where they end."""
    if not self._path.exists():
      return 0
    size = 0
    with self._path.open("rb") as file:
      for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
          break
        try:
          self._take(json.loads(line), is_first=number == 1)
        except ConfigError:
          raise
        except (ValueError, TypeError, KeyError) as error:
          raise ConfigError(
            f"The journal {str(self._path)!r} must be one of version"
            f" {_VERSION}; line {number} is not: {error}."
          ) from error
        size += len(line)
    return size

  def _check(self, before: Mapping[str, str]) -> None:
    """Refuses to go on with answers that depend on something else."""
    for name in sorted(before.keys() | self._settings.keys()):
      old, new = before.get(name), self._settings.get(name)
      if old != new:
        raise ConfigError(
          f"{name} must be what the answers in the journal"
          f" {str(self._path)!r} were computed with, {old or 'nothing'}; got"
          f" {new or 'nothing'}."
        )

  def _take(self, line: dict[str, Any], *, is_first: bool) -> None:
    if is_first:
      if line["journal"] != _VERSION:
        raise ValueError(f"it is one of version {line['journal']}")
      before = line["settings"]
      if not isinstance(before, dict):
        raise ValueError(f"settings must be an object; got {before!r}")
      self._check(before)
    elif "accepted" in line:
      document = line["accepted"]
      self.accepted[document["request_id"]] = Accepted(
        request_id=document["request_id"],
        prompt_token_ids=tuple(document["prompt_token_ids"]),
        sampling=SamplingParams(**document["sampling"]),
      )
    else:
      document = line["ended"]
      token_ids = tuple(document.pop("token_ids"))
      ended = Ended(token_ids=token_ids, **document)
      self.ended[ended.request_id] = ended


def _text(request: Accepted) -> str:
  """A request as it is written down: behind a restart, lists were tuples."""
  return json.dumps(dataclasses.asdict(request))
