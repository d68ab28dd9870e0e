"""What a simulation of a cluster measured."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from infinite_llm.simulator.traces import TraceRequest


@dataclasses.dataclass(kw_only=True)
class RequestRecord:
  """What became of one request of a trace.

  Attributes:
    request: As the trace has it.
    first_token_s: When it got its first token; None before that.
    finish_s: When it had all of them; None if it never had.
    refused: Why it was never taken, if it was not.
    error: Why it failed, if it did.
  """

  request: TraceRequest
  first_token_s: float | None = None
  finish_s: float | None = None
  refused: str | None = None
  error: str | None = None

  @property
  def num_tokens(self) -> int:
    """Its context when it is over: prompt and output."""
    return self.request.prompt_tokens + self.request.output_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationResult:
  """What a run measured; seconds are simulated ones.

  Attributes:
    records: One for each request of the trace, in its order.
    duration_s: Until the last request ended, or time was up.
    instance_steps: Steps of instances that had rows of their own.
    num_messages: Messages between managers.
    num_blocks_moved: rBlocks sent between instances.
    num_blocks_recalled: Those of them that went home.
    num_blocks_swapped: rBlocks copied to host memory, or back.
    num_migrated: Requests that went to another instance.
    num_preempted: How often a request gave its rBlocks up.
    num_stalls: How often nothing went on until a request was made to.
    remote_share: Part of the rBlocks in use that were lent, over time.
    num_blocks_leaked: rBlocks that nobody gave back in the end.
  """

  records: Sequence[RequestRecord]
  duration_s: float
  instance_steps: int
  num_messages: int
  num_blocks_moved: int
  num_blocks_recalled: int
  num_blocks_swapped: int
  num_migrated: int
  num_preempted: int
  num_stalls: int
  remote_share: float
  num_blocks_leaked: int

  def finished(self) -> list[RequestRecord]:
    """Requests that got all their tokens."""
    return [r for r in self.records if r.finish_s is not None]

  def summary(self) -> dict[str, float | int | None]:
    """Figures to compare runs by; latencies are of finished requests."""
    done = self.finished()
    output = sum(record.request.output_tokens for record in done)
    to_first = [
      record.first_token_s - record.request.arrival_s
      for record in done
      if record.first_token_s is not None
    ]
    whole = [
      record.finish_s - record.request.arrival_s
      for record in done
      if record.finish_s is not None
    ]
    per_token = [
      (record.finish_s - record.first_token_s)
      / (record.request.output_tokens - 1)
      for record in done
      if record.finish_s is not None
      and record.first_token_s is not None
      and record.request.output_tokens > 1
    ]
    seconds = self.duration_s or math.inf
    return {
      "num_requests": len(self.records),
      "num_finished": len(done),
      "num_refused": sum(r.refused is not None for r in self.records),
      "num_failed": sum(r.error is not None for r in self.records),
      "duration_s": self.duration_s,
      "output_tokens_per_s": output / seconds,
      "served_tokens_per_s": sum(r.num_tokens for r in done) / seconds,
      "longest_context_tokens": max((r.num_tokens for r in done), default=0),
      "first_token_median_s": _median(to_first),
      "first_token_p99_s": _p99(to_first),
      "latency_median_s": _median(whole),
      "latency_p99_s": _p99(whole),
      "per_token_median_s": _median(per_token),
      "instance_steps": self.instance_steps,
      "num_messages": self.num_messages,
      "num_blocks_moved": self.num_blocks_moved,
      "num_blocks_recalled": self.num_blocks_recalled,
      "num_blocks_swapped": self.num_blocks_swapped,
      "num_migrated": self.num_migrated,
      "num_preempted": self.num_preempted,
      "num_stalls": self.num_stalls,
      "remote_share": self.remote_share,
      "num_blocks_leaked": self.num_blocks_leaked,
    }


def _median(values: Sequence[float]) -> float | None:
  return statistics.median(values) if values else None


def _p99(values: Sequence[float]) -> float | None:
  """The value that 99 % do not exceed."""
  return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else None
