"""No spill, no cost: what sharing costs, with spills and without.

Instance 0 prefills long prompts all the time, the others decode full batches.
That is measured in up to four cases:

- *alone*: an engine for each instance, one after the other, in one process:
  what a process of its own gives that shares nothing, not even a core.
- *separate*: the same engines at once, in a thread or a process each.
- *sharing*: one lending group of all instances, which need not lend.
- *spilling*: the same beside a request that no instance can hold, once while
  it is prefilled and once while it decodes.

With `cluster.num_processes` 1 all instances of a case lie in this process. With
as many as instances, this one starts a process for each separate engine and
each member of the group, which take turns by repeats, and computes nothing
itself; there is no case "alone" then.

Requests that still decode when the windows of all instances are over are
aborted, since waiting for their answers would take as long again. Answers to
the same prompt are compared as far as both went.

    python -m experiments.run --config=configs/no_spill_cost.py
      --workdir=runs/no_spill_cost --config.cluster.num_processes=4
"""

import contextlib
import gc
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from experiments import separate_cases, sharing_cases
from experiments.case_log import CaseLog
from experiments.case_processes import PART_FILE, run_in_processes
from experiments.case_ratios import case_ratios, cases_report
from experiments.case_runner import CaseRunner
from experiments.model_shape import model_shape
from experiments.run_facts import run_facts
from experiments.steady_load import LoadShape
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.distributed.platforms import check_platform, choose_platform
from infinite_llm.distributed.runtime import current_group
from infinite_llm.errors import ConfigError
from infinite_llm.models.dummy_weights import draw_model

_CASES = ("alone", "separate", "sharing", "spilling")
_PARTS = ("", "separate", "sharing")
_UNTIMELY = {"separate", "spilling"}

_Row = dict[str, Any]


def run(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs all cases, or the part of a process that this experiment started.

  Args:
    config: See `configs/no_spill_cost.py`.
    workdir: Gets `rows.json`, anew after each case.

  Returns:
    `rows`, `ratios` of two cases each, and whether all is `correct`.

  Raises:
    GroupError: If a process that it started fails.
  """
  _check(config)
  if config.child.part:
    return _run_part(config, workdir)
  if current_group() is not None:
    raise ConfigError(
      "no_spill_cost must be started without a launcher: it starts"
      " cluster.num_processes processes itself."
    )
  choose_platform(config.cluster.platform)
  cluster = config.cluster
  num_devices = cluster.num_instances * cluster.tensor_parallel
  earlier = _earlier_rows(config.earlier_rows)
  (workdir / "rows.json").unlink(missing_ok=True)
  facts = run_facts(num_devices, device="")

  def tables(log: CaseLog) -> dict[str, list[_Row]]:
    about = {**facts, "device": log.device}
    ratios = case_ratios([*earlier, *log.rows])
    return {
      "rows": [{**row, **about} for row in log.rows],
      "ratios": [{**ratio, **about} for ratio in ratios],
    }

  def write(log: CaseLog) -> None:
    text = json.dumps(tables(log), indent=1) + "\n"
    (workdir / "rows.json").write_text(text, encoding="utf-8")

  if cluster.num_processes > 1:
    log = run_in_processes(config, workdir, lambda: _new_log(config, write))
  else:
    log = _new_log(config, write)
    _run_here(config, log)
  write(log)
  result = tables(log)
  print(cases_report(**result))
  for fault in log.faults:
    print(f"WRONG: {fault}")
  return {
    **result,
    "long": log.long,
    "launches": log.launches,
    "took_s": log.took_s,
    "answers_compared": log.num_compared,
    "answers_different": log.num_different,
    "faults": log.faults,
    "correct": not log.faults,
    "device": {
      "platform": cluster.platform,
      "kind": log.device,
      "count": num_devices,
    },
  }


def _earlier_rows(path: str) -> list[_Row]:
  """Rows of an earlier run; a case that was measured again has newer ones."""
  if not path:
    return []
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["rows"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f"earlier_rows must be empty or a rows.json; got {path!r} ({error!r})."
    ) from error


def _run_here(config: ml_collections.ConfigDict, log: CaseLog) -> None:
  """Runs all cases in this process."""
  cluster = config.cluster
  if cluster.platform == "cpu":
    # Where JAX runs already, it keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
      jax.config.update(
        "jax_num_cpu_devices", cluster.num_instances * cluster.tensor_parallel
      )
  check_platform(cluster.platform)
  log.device = jax.devices()[0].device_kind
  runner = CaseRunner(config, log)
  model = draw_model(
    model_shape(config.model),
    make_mesh(cluster.num_instances, cluster.tensor_parallel),
    seed=config.seed,
    dtype=config.model.dtype,
  )
  if {"alone", "separate"} & set(config.cases):
    separate_cases.run_here(runner, model)
    gc.collect()  # Pools leave the devices before the next ones are placed.
  if {"sharing", "spilling"} & set(config.cases):
    sharing_cases.run_here(runner, model)


def _run_part(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> Mapping[str, Any]:
  """Runs what another process of this experiment has left to this one."""
  log = _new_log(config, lambda log: log.write(workdir / PART_FILE))
  runner = CaseRunner(config, log)
  if config.child.part == "separate":
    separate_cases.run_process(runner, config.child.instance)
  else:
    sharing_cases.run_process(runner)
  log.write(workdir / PART_FILE)
  return {"faults": log.faults}


def _new_log(
  config: ml_collections.ConfigDict, on_change: Callable[[CaseLog], None]
) -> CaseLog:
  return CaseLog(is_exact=config.model.dtype == "float32", on_change=on_change)


def _check(config: ml_collections.ConfigDict) -> None:
  """Refuses loads that spill by themselves, and a long one that would not."""
  _check_cluster(config)
  capacity = (config.cache.num_blocks - 1) * config.cache.block_size
  for name, value, holds, rule in (
    ("repeats", config.repeats, config.repeats >= 1, "1"),
    (
      "long.prompt_tokens",
      config.long.prompt_tokens,
      "spilling" not in config.cases or config.long.prompt_tokens > capacity,
      f"{capacity + 1}, more than an instance holds",
    ),
  ):
    if not holds:
      raise ConfigError(f"{name} must be at least {rule}; got {value}.")
  for name in ("prefill", "decode"):
    shape = LoadShape(**config[name].to_dict())
    if shape.most_tokens > capacity:
      raise ConfigError(
        f"{name} must have at most {capacity} tokens in flight, what an"
        f" instance holds; got {shape.most_tokens}."
      )
  decode = config.decode
  if decode.warm_steps + decode.steps >= decode.max_tokens:
    raise ConfigError(
      f"decode.max_tokens must be more than warm_steps + steps; got"
      f" {decode.max_tokens}."
    )


def _check_cluster(config: ml_collections.ConfigDict) -> None:
  """Refuses what no processes can run."""
  cluster, cases = config.cluster, set(config.cases)
  several = cluster.num_processes != 1
  for name, value, holds, rule in (
    (
      "cluster.num_instances",
      cluster.num_instances,
      cluster.num_instances >= 2,
      "at least 2",
    ),
    (
      "cluster.num_processes",
      cluster.num_processes,
      cluster.num_processes in (1, cluster.num_instances),
      f"1 or num_instances ({cluster.num_instances})",
    ),
    (
      "cluster.patience_s",
      cluster.patience_s,
      cluster.patience_s > 0,
      "positive",
    ),
    (
      "cases",
      tuple(config.cases),
      cases and cases <= set(_CASES),
      f"some of {', '.join(_CASES)}",
    ),
    (
      "cases",
      tuple(config.cases),
      not several or cases != {"alone"},
      "more than alone, which is of one process",
    ),
    (
      "cases",
      tuple(config.cases),
      not several or cases & {"separate", "spilling", "sharing"} != _UNTIMELY,
      "with sharing too, if with separate and spilling: they take turns",
    ),
    (
      "child.part",
      config.child.part,
      config.child.part in _PARTS,
      "empty, separate or sharing",
    ),
  ):
    if not holds:
      raise ConfigError(f"{name} must be {rule}; got {value!r}.")
