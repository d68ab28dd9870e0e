"""Compiles every program that a configuration can need, before serving."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from absl import logging

from infinite_llm.config import MAX_PROGRAM_KINDS, EngineConfig
from infinite_llm.engine.group_inputs import empty_payloads, empty_slots
from infinite_llm.engine.model_runner import ModelRunner
from infinite_llm.engine.programs import StepOutput
from infinite_llm.engine.sampler import Sampler
from infinite_llm.types import NO_EPOCH, NULL_BLOCK_ID, Quota, Shift

Progress = Callable[[str, int, int], None]
"""Called with what comes next, how many are done, how many there are."""

_Outputs = Iterable[tuple[int, StepOutput]] | None
"""Outputs of a job, each with its instance."""


def warm_up(
  runner: ModelRunner,
  samplers: Sequence[Sampler],
  config: EngineConfig,
  progress: Progress | None = None,
) -> None:
  """Runs every program once with nothing to do.

  Afterwards a compilation is logged and counted. Blocks the host.

  Args:
    runner: Launches programs.
    samplers: Sampler of each instance.
    config: Sizes of everything.
    progress: Told how far this is.
  """
  warn_of_many_programs(config)
  jobs = list(_jobs(runner, config))
  for done, (name, job) in enumerate(jobs):
    if progress:
      progress(name, done, len(jobs))
    for instance, output in job() or ():
      samplers[runner.instances.index(instance)].warm_up(output)
  jax.block_until_ready(runner.pool.group())
  if progress:
    progress("ready", len(jobs), len(jobs))
  runner.launches.clear()
  runner.programs.close_warm_up()


def warn_of_many_programs(config: EngineConfig) -> None:
  """Logs a warning if the buckets make more programs than are sensible."""
  num_kinds = config.num_program_kinds - config.num_layered_kinds
  if num_kinds > MAX_PROGRAM_KINDS:
    logging.warning(
      "The buckets make %d kinds of programs; more than %d take long to compile"
      " and much memory.",
      num_kinds,
      MAX_PROGRAM_KINDS,
    )


def _jobs(
  runner: ModelRunner, config: EngineConfig
) -> Iterator[tuple[str, Callable[[], _Outputs]]]:
  """Yields a name and what to run for every program."""
  instances = runner.instances
  for is_prefill, buckets in (
    (False, config.scheduler.decode_buckets),
    (True, config.scheduler.prefill_buckets),
  ):
    kind = "prefill" if is_prefill else "decode"
    for bucket, instance in itertools.product(buckets, instances):
      yield (
        f"local {kind}, {bucket} tokens",
        functools.partial(_local, runner, instance, bucket, is_prefill),
      )
  for instance in instances:
    yield (
      "table entries",
      functools.partial(runner.write_entries, instance),
    )
  if config.has_group:
    yield from _group_jobs(runner, config)


def _group_jobs(
  runner: ModelRunner, config: EngineConfig
) -> Iterator[tuple[str, Callable[[], _Outputs]]]:
  instances = runner.instances
  num_instances, lending = config.num_instances, config.lending
  nothing = [[] for _ in instances]
  slots = [empty_slots(num_instances, lending.spill_slots) for _ in instances]

  def group(bucket: int | None, is_prefill: bool) -> _Outputs:
    return zip(
      instances,
      runner.group_step(nothing, slots, is_prefill=is_prefill, bucket=bucket),
      strict=True,
    )

  def check() -> None:
    runner.verify(nothing, slots)

  def exchange(shift: Shift, quota: Quota) -> None:
    runner.exchange(shift, [empty_payloads(quota) for _ in instances])

  yield "group decode", functools.partial(group, None, False)
  for bucket in lending.group_prefill_buckets:
    yield (
      f"group prefill, {bucket} tokens",
      functools.partial(group, bucket, True),
    )
  yield "coverage check", check
  for shift, quota in itertools.product(
    range(1, num_instances), lending.exchange_buckets
  ):
    yield (
      f"exchange, shift {shift}, {quota} rBlocks",
      functools.partial(exchange, shift, quota),
    )
  for instance in instances:
    yield (
      "reservation epochs",
      functools.partial(
        runner.grant_epochs, instance, {NULL_BLOCK_ID: NO_EPOCH}
      ),
    )


def _local(
  runner: ModelRunner, instance: int, bucket: int, is_prefill: bool
) -> _Outputs:
  output = runner.local_step(instance, [], is_prefill=is_prefill, bucket=bucket)
  return [(instance, output)]
