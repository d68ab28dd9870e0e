"""Advances what was proved, and only that."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from infinite_llm.engine.in_flight import Flight, InFlight, LaunchedStep
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.engine.request_book import RequestBook
from infinite_llm.engine.sampler import Sampler, fetch
from infinite_llm.engine.step_launcher import GROUP_PREFILL
from infinite_llm.errors import ModelError
from infinite_llm.scheduler.batching import Batcher
from infinite_llm.scheduler.request import RequestStatus
from infinite_llm.types import InstanceId, RequestUid


class StepCommitter:
  """Takes what steps gave.

  Attributes:
    num_unproved_rows: Rows whose coverage was not what they demanded.
  """

  def __init__(
    self,
    book: RequestBook,
    in_flight: InFlight,
    instances: Sequence[InstanceId],
    batchers: Sequence[Batcher],
    samplers: Sequence[Sampler],
    clock: Callable[[], float],
  ):
    """Keeps what it commits to.

    Args:
      book: All requests.
      in_flight: Steps under way.
      instances: Numbers of the instances of this process.
      batchers: Continuous batching of each.
      samplers: Sampler of each.
      clock: Monotonic seconds, as of the launches.
    """
    self._book = book
    self._in_flight = in_flight
    self._batcher = dict(zip(instances, batchers, strict=True)).__getitem__
    self._sampler = dict(zip(instances, samplers, strict=True)).__getitem__
    self._clock = clock
    self.num_unproved_rows = 0

  def commit(self, flight: Flight) -> list[RequestOutput]:
    """Advances the rows of a flight. Blocks the host until they are there.

    After an exception the requests whose rows were perhaps committed by half
    are computed anew.

    Args:
      flight: One that is in flight.

    Returns:
      Outputs of the requests that got a token and go on.
    """
    results = [fetch(step.pending) for step in flight.steps]
    now_s = self._clock()
    outputs = []
    try:
      self._in_flight.remove(flight)
      for step, result in zip(flight.steps, results, strict=True):
        self._commit_step(step, result, now_s, outputs)
    except BaseException:
      self._recompute(flight)
      raise
    return outputs

  def _commit_step(
    self,
    step: LaunchedStep,
    result: Mapping[str, np.ndarray],
    now_s: float,
    outputs: list[RequestOutput],
  ) -> None:
    """Advances the proved rows of a step that was over at `now_s`."""
    batcher = self._batcher(step.instance)
    sampler = self._sampler(step.instance)
    proved, tokens = result["proved"].tolist(), result["token"].tolist()
    for b, row in enumerate(step.rows):
      if row.uid not in self._book:  # It ended while this was under way.
        continue
      request = self._book[row.uid].request
      is_running = request.status is RequestStatus.RUNNING
      if not is_running or row.start != request.num_computed_tokens:
        # The row before it was not proved, or not committed: it stood on
        # nothing, and so does what was planned behind it.
        sampler.forget(row.uid)
        batcher.hold()
        continue
      if step.kind == GROUP_PREFILL:
        # What it waited for on the devices counts: others wait for that too.
        duration_s = now_s - step.launched_s
        request.group_token_s = duration_s / row.num_tokens
      if not proved[b]:
        self.num_unproved_rows += 1
        logging.warning(
          "Request %s: what its step read is not what it demanded; trying"
          " again.",
          request.request_id,
        )
        sampler.forget(row.uid)
        batcher.row_failed(row)
        continue
      batcher.advance(row)
      if row.samples:
        sampled = {"token": tokens[b]}
        if request.sampling.logprobs is not None:
          sampled = {name: x[b] for name, x in result.items()}
        if (output := self._append(row.uid, sampled)) is not None:
          outputs.append(output)

  def _recompute(self, flight: Flight) -> None:
    """Begins requests anew whose rows were perhaps committed by half."""
    for step in flight.steps:
      for row in step.rows:
        if (
          row.uid in self._book
          and self._book[row.uid].request.status is RequestStatus.RUNNING
        ):
          self._sampler(step.instance).forget(row.uid)
          self._batcher(step.instance).preempt(row.uid)

  def _append(
    self, uid: RequestUid, sampled: Mapping[str, Any]
  ) -> RequestOutput | None:
    """Gives a request its next token; its output if it goes on."""
    entry = self._book[uid]
    batcher = self._batcher(entry.instance)
    status = entry.stream.push(sampled)
    if status is RequestStatus.FAILED:
      error = ModelError(
        f"Request {entry.request.request_id}: the model gave logits that are"
        f" no distribution at token {entry.request.num_tokens}: a NaN, or"
        " nothing finite."
      )
      batcher.fail(uid, error)
      return None
    self._book.note_token(uid)
    if status is None:
      return entry.stream.output(None)
    batcher.finish(uid, status)
    return None
