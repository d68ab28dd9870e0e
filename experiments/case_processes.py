"""The cases of `no_spill_cost` with a process for each instance.

This process starts the others and puts together what they write. It never has
JAX look for devices: on a GPU that would take memory, and time, from them.
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Mapping

import ml_collections

from configs.no_spill_cost import get_config
from experiments.case_log import CaseLog, print_progress
from experiments.case_turns import SEPARATE, SHARING
from experiments.child_processes import ChildProcesses, ending_on_sigterm
from experiments.launch.local import process_gpus
from experiments.model_shape import hf_config
from experiments.run import config_fields

PART_FILE = "part.json"
"""What a process of a part writes of it, as far as it is."""

_CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "no_spill_cost.py"
_SHARING = {SHARING, "spilling"}

_TOGETHER = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""Two processes have a GPU together, and take no more of it than they need."""


def run_in_processes(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  make_log: Callable[[], CaseLog],
) -> CaseLog:
  """Runs each case in processes of its own.

  Args:
    config: See `configs/no_spill_cost.py`.
    workdir: Gets a folder for each part, and the logs.
    make_log: Makes an empty log, whose `on_change` hears of each case.

  Returns:
    What all cases gave.

  Raises:
    GroupError: If a process fails; then the others are ended.
  """
  with ending_on_sigterm():
    return _Parts(config, workdir.resolve(), make_log).run()


class _Parts:
  """The processes of both parts, and what they wrote."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    make_log: Callable[[], CaseLog],
  ):
    """Prepares the folder."""
    self._config = config
    self._folder = folder
    self._make_log = make_log
    self._names: list[str] = []
    self._written_ns: dict[str, int] = {}
    self._logs: dict[str, CaseLog] = {}
    shutil.rmtree(folder / "barrier", ignore_errors=True)
    for name in ("barrier", "model"):
      (folder / name).mkdir(exist_ok=True)
    text = json.dumps(hf_config(config.model), indent=1) + "\n"
    (folder / "model" / "config.json").write_text(text, encoding="utf-8")

  def run(self) -> CaseLog:
    """Runs what the config names."""
    cases = set(self._config.cases)
    with ChildProcesses() as children:
      if SEPARATE in cases:
        self._start_separate(children)
      if cases & _SHARING:
        self._start_sharing(children)
      children.wait(lambda: self._look(self._names))
    return self._joined()

  def _start_separate(self, children: ChildProcesses) -> None:
    cluster = self._config.cluster
    gpus = [""] * cluster.num_instances
    if cluster.platform == "gpu":
      gpus = process_gpus(cluster.num_instances, cluster.tensor_parallel)
    for instance, gpu in enumerate(gpus):
      name = f"{SEPARATE}-{instance}"
      children.start(
        name,
        ["-m", "experiments.run", *self._flags(name, SEPARATE, instance)],
        self._folder / f"{name}.log",
        _TOGETHER | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
      )

  def _start_sharing(self, children: ChildProcesses) -> None:
    name = SHARING
    children.start(
      name,
      [
        "-m",
        "experiments.launch.local",
        f"--num_processes={self._config.cluster.num_processes}",
        "--",
        *self._flags(name, SHARING),
      ],
      self._folder / f"{name}.log",
      _TOGETHER,
    )

  def _flags(self, name: str, part: str, instance: int = 0) -> list[str]:
    """What tells a process of `experiments.run` which part is its own."""
    self._names.append(name)
    workdir = self._folder / name
    workdir.mkdir(exist_ok=True)
    (workdir / PART_FILE).unlink(missing_ok=True)
    usual = config_fields(get_config())
    fields = {
      **config_fields(self._config),
      "child.part": part,
      "child.instance": instance,
      "child.folder": str(self._folder),
    }
    return [
      f"--config={_CONFIG}",
      f"--workdir={workdir}",
      *(
        f"--config.{field}={value}"
        for field, value in fields.items()
        if value != usual[field]
      ),
    ]

  def _look(self, names: list[str]) -> None:
    """Prints and passes on what is new in the files of processes."""
    has_changed = False
    for name in names:
      path = self._folder / name / PART_FILE
      try:
        written_ns = path.stat().st_mtime_ns
      except FileNotFoundError:
        continue
      if written_ns == self._written_ns.get(name):
        continue
      before = self._took_s(name)
      self._written_ns[name] = written_ns
      self._logs[name] = CaseLog.read(path)
      print_progress(f"{name}: ", before, self._took_s(name))
      has_changed = True
    if has_changed:
      joined = self._joined()
      if joined.on_change is not None:
        joined.on_change(joined)

  def _took_s(self, name: str) -> Mapping[str, float | None]:
    log = self._logs.get(name)
    return log.took_s if log else {}

  def _joined(self) -> CaseLog:
    joined = self._make_log()
    for name in self._names:
      if name in self._logs:
        joined.join(name, self._logs[name])
    return joined
