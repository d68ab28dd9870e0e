"""Cases in which each instance has an engine of its own."""

import dataclasses
import pathlib

import jax

from experiments.case_runner import CaseRunner, Loads
from experiments.case_turns import SEPARATE, CaseTurns
from experiments.cluster import build_llm
from experiments.file_barrier import FileBarrier
from experiments.steady_load import drive, drive_each
from infinite_llm.cache.rows import split_rows
from infinite_llm.distributed.mesh import row_mesh
from infinite_llm.engine.engine import Engine
from infinite_llm.models.loaded_model import LoadedModel
from infinite_llm.types import InstanceId


def run_here(runner: CaseRunner, model: LoadedModel) -> None:
  """Runs engines of this process, alone and then all at once.

  Args:
    runner: Runs those of both cases that its config names.
    model: Weights on all instances.
  """
  config = runner.config
  with runner.log.timed("warm-up of separate engines"):
    engines = [
      Engine(_row_of(model, instance), runner.engine_config(1))
      for instance in range(config.cluster.num_instances)
    ]
    for engine in engines:
      engine.warm_up()

  def alone(repeat: int) -> Loads:
    loads = {
      i: runner.load(e, i, "alone", repeat) for i, e in enumerate(engines)
    }
    for instance, load in loads.items():
      drive(engines[instance], [load], lambda load=load: load.is_over)
    return loads

  def together(repeat: int) -> Loads:
    loads = {
      i: runner.load(e, i, "separate", repeat) for i, e in enumerate(engines)
    }
    drive_each(engines, [*loads.values()])
    return loads

  if "alone" in config.cases:
    runner.measure("alone", engines, alone)
  if "separate" in config.cases:
    runner.measure("separate", engines, together)
  for instance, engine in enumerate(engines):
    runner.check_empty(engine, f"the engine of instance {instance}")


def run_process(runner: CaseRunner, instance: InstanceId) -> None:
  """Runs one instance's engine beside those of other processes.

  All of them are busy whenever one is measured, and the sharing engine is not.

  Args:
    runner: Runs the case "separate"; its config has the folder to meet in.
    instance: Whose engine this process has.
  """
  config = runner.config
  folder = pathlib.Path(config.child.folder)
  barrier = FileBarrier(
    folder / "barrier",
    instance,
    config.cluster.num_instances,
    config.cluster.patience_s,
  )
  with runner.log.timed("warm-up"):
    engine = build_llm(
      folder / "model",
      runner.engine_config(1),
      config.cluster.platform,
      show_progress=False,
    ).engine
    runner.log.device = jax.devices()[0].device_kind
  turns = CaseTurns(config, SEPARATE, instance)

  def serve_loads(repeat: int) -> Loads:
    load = runner.load(engine, instance, "separate", repeat)

    def is_over() -> bool:
      if not load.is_over:
        return False
      barrier.arrive(f"windows {repeat}")
      return barrier.is_complete(f"windows {repeat}")

    with turns.turn(repeat):
      drive(engine, [load], is_over)
    return {instance: load}

  runner.measure("separate", [engine], serve_loads)
  runner.check_empty(engine, f"the engine of instance {instance}")


def _row_of(model: LoadedModel, instance: InstanceId) -> LoadedModel:
  """The model of one instance alone, made of the same weights in memory."""
  row = row_mesh(model.mesh, instance)
  state = jax.tree.map(
    lambda leaf: split_rows(leaf, [row], leaf.sharding.spec)[0], model.state
  )
  return dataclasses.replace(model, mesh=row, state=state)
