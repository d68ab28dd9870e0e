"""Runs one experiment: a config file, its fields as flags, a folder of results.

    python -m experiments.run --config=configs/quickstart.py
      --workdir=runs/quickstart --config.document.num_tokens=131072

The config file's `get_config()` names the experiment; every field can be set on
the command line. The folder gets `config.json`, the config as it was run, and
`result.json`, what came out and on what. The exit status is 0 if the result is
right, 1 if it says `"correct": false` (or any `"..._correct"`), 2 if the
command or its input cannot work, 75 if another process of its group is gone.
`python -m experiments.launch.local` starts it in several processes.
"""

import datetime
import difflib
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import runpy
import shlex
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from infinite_llm.distributed.group_end import (
  BROKEN_GROUP,
  await_close,
  end_with_group,
)
from infinite_llm.distributed.runtime import GroupOptions, ProcessGroup
from infinite_llm.engine.member import Member
from infinite_llm.errors import (
  CheckpointError,
  ConfigError,
  GroupError,
  RequestError,
)

_CONFIG = re.compile(r"^--?config(?:=(.*))?$")
_OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=]+)")
_HELP = {"-h", "-help", "--help", "--helpshort", "--helpfull"}
_PACKAGES = ("infinite-llm", "jax", "jaxlib", "flax", "numpy", "tokenizers")

_PATIENCE_S = 600.0
"""How long process 0 may take to write down what all have computed."""

Experiment = Callable[[ml_collections.ConfigDict, pathlib.Path], Mapping]
"""`run(config, workdir)` of `experiments/<name>.py`; gives what `result.json`
is to hold.

In several processes only process 0 calls it, and the others run the instances
of its engine (`Member`). An experiment without an engine may have all processes
compute the same instead: then its module has `take_part(config)` too, which the
others call beside `run`. It writes nothing.
"""


def main(argv: Sequence[str]) -> int:
  """Runs the experiment that a command line asks for.

  Args:
    argv: The command line, program name first.

  Returns:
    The exit status.
  """
  logging.use_absl_handler()
  try:
    if _HELP.intersection(argv[1:]):
      print(_help(argv))
      return 0
    config, workdir = parse(argv)
    module = _find_experiment(config.experiment)
    options = GroupOptions.from_environment()
    if options is not None:
      return _run_in_group(options, module, config, workdir, argv)
    result = _run(module.run, config, workdir, argv)
  except GroupError as error:
    print(f"error: {error}", file=sys.stderr)
    return BROKEN_GROUP
  except (ConfigError, RequestError, CheckpointError) as error:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  return 0 if _is_right(result) else 1


def _run_in_group(
  options: GroupOptions,
  module: types.ModuleType,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  argv: Sequence[str],
) -> int:
  """Runs this process's part: process 0 the experiment, others what it needs.

  Returns:
    The exit status; `BROKEN_GROUP` if another process is missing or gone.
  """
  check_cluster(config)
  take_part = getattr(module, "take_part", None)
  try:
    group = ProcessGroup(
      options,
      {f"config.{k}": repr(v) for k, v in config_fields(config).items()},
      platform=config.cluster.platform,
      num_instances=config.cluster.num_instances,
      tensor_parallel=config.cluster.tensor_parallel,
    )
    with end_with_group(group):
      result = {}
      if group.is_leader:
        result = _run(module.run, config, workdir, argv)
      elif take_part is not None:
        take_part(config)
        await_close(group.link, _PATIENCE_S)
      else:
        Member(group).run()
  except GroupError as error:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return BROKEN_GROUP
  return 0 if _is_right(result) else 1


def _run(
  run: Experiment,
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  argv: Sequence[str],
) -> Mapping:
  """Runs the experiment and writes both files."""
  started = datetime.datetime.now(datetime.UTC)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # A run that fails must not leave an earlier run's result behind.
    (workdir / "result.json").unlink(missing_ok=True)
    _write_json(workdir / "config.json", config.to_dict())
  except OSError as error:
    raise ConfigError(
      f"workdir must be a folder that can be written; got {str(workdir)!r}"
      f" ({error.strerror})."
    ) from error
  result = dict(run(config, workdir))
  about = {
    "command": shlex.join(["python", "-m", "experiments.run", *argv[1:]]),
    "date": started.isoformat(timespec="seconds"),
    "device": {
      # Told by experiments that leave the devices to other processes.
      **(result.pop("device", None) or _own_devices()),
      "host_cpu": _cpu_model(),
      "host_cpus": os.cpu_count(),
    },
    "versions": {
      "python": sys.version.split()[0],
      **{name: _version(name) for name in _PACKAGES},
    },
  }
  # Linux counts in KiB.
  peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  _write_json(
    workdir / "result.json",
    {**result, "peak_rss_bytes": peak_rss_bytes, "run": about},
  )
  return result


def _own_devices() -> Mapping[str, Any]:
  """What JAX has in this process."""
  devices = jax.devices()
  return {
    "platform": devices[0].platform,
    "kind": devices[0].device_kind,
    "count": len(devices),
  }


def _is_right(result: Mapping) -> bool:
  """False if `correct`, or any `..._correct`, is."""
  return all(
    value is not False
    for name, value in result.items()
    if name == "correct" or name.endswith("_correct")
  )


def check_cluster(config: ml_collections.ConfigDict) -> None:
  """Raises `ConfigError` if an experiment cannot run in several processes."""
  if "platform" not in config.get("cluster", {}):
    raise ConfigError(
      "config.experiment must be one that runs on a cluster, to run in several"
      f" processes; got {config.experiment!r}."
    )


def parse(
  argv: Sequence[str],
) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  """Reads the flags and loads the config.

  Args:
    argv: The command line, program name first.

  Returns:
    The config and the folder for results.

  Raises:
    ConfigError: A flag or a field does not exist or has a wrong value.
  """
  path, rest = _split_config(argv)
  config = _load_config(path)
  for arg in rest:
    if match := _OVERRIDE.match(arg):
      _check_field(match[1], config)
  # Flags of our own, so that nothing global is touched.
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=rest
  )
  flags.DEFINE_string(
    "workdir", f"runs/{config.experiment}", "Results.", flag_values=values
  )
  try:
    _, *extra = values([argv[0], *rest])
  except flags.Error as error:
    raise ConfigError(str(error)) from error
  if extra:
    raise ConfigError(f"There is no argument {extra[0]!r}; see --help.")
  return values.config, pathlib.Path(values.workdir)


def _split_config(argv: Sequence[str]) -> tuple[str, list[str]]:
  """Takes `--config=FILE` or `--config FILE` out of a command line."""
  args = iter(argv[1:])
  path = None
  rest = []
  for arg in args:
    match = _CONFIG.match(arg)
    if match is None:
      rest.append(arg)
    else:
      path = next(args, None) if match[1] is None else match[1]
  if not path:
    raise ConfigError(
      f"--config must name a config file, such as {_config_files()}; got none."
      " See --help."
    )
  return path, rest


def _load_config(path: str) -> ml_collections.ConfigDict:
  """Runs a config file and its `get_config()`."""
  try:
    get_config = runpy.run_path(path).get("get_config")
  except (OSError, SyntaxError) as error:
    raise ConfigError(
      f"--config must be a Python file; got {path!r} ({error})."
    ) from error
  config = get_config and get_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(f"{path} must have a get_config() that gives ConfigDict.")
  if "experiment" not in config:
    raise ConfigError(f"{path} must set config.experiment; it does not.")
  return config


def _check_field(name: str, config: ml_collections.ConfigDict) -> None:
  """Raises `ConfigError` if there is no such field, with the nearest one."""
  fields = config_fields(config)
  if name in fields:
    return
  if any(field.startswith(f"{name}.") for field in fields):
    inside = ", ".join(f for f in fields if f.startswith(f"{name}."))
    raise ConfigError(f"config.{name} is a group; set one of {inside}.")
  # First by the whole path, then by the last word alone.
  near = difflib.get_close_matches(name, fields, n=1)
  if not near:
    last_words = {field.rpartition(".")[2]: field for field in fields}
    last = name.rpartition(".")[2]
    near = [
      last_words[word]
      for word in difflib.get_close_matches(last, last_words, n=1)
    ]
  hint = f"did you mean config.{near[0]}?" if near else "see --help."
  raise ConfigError(f"There is no field config.{name}; {hint}")


def config_fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns all leaves by their dotted names, in order."""
  fields = {}
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      fields |= {f"{name}.{k}": v for k, v in config_fields(value).items()}
    else:
      fields[name] = value
  return fields


def _find_experiment(name: str) -> types.ModuleType:
  """Returns `experiments/<name>.py`, which has the function `run`."""
  try:
    module = importlib.import_module(f"experiments.{name}")
  except ModuleNotFoundError as error:
    if error.name != f"experiments.{name}":
      raise
    here = pathlib.Path(__file__).parent
    names = sorted(path.stem for path in here.glob("*.py"))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"There is no experiment {name!r}{hint}") from error
  if not hasattr(module, "run"):
    raise ConfigError(f"experiments/{name}.py is no experiment: it has no run.")
  return module


def _help(argv: Sequence[str]) -> str:
  """What `--help` prints; with --config, all its fields as well."""
  text = [
    (__doc__ or "").strip(),
    "",
    "Flags:",
    "  --config=FILE        the config file; required",
    "  --config.FIELD=VALUE any of its fields",
    "  --workdir=FOLDER     where results go; runs/<experiment> if not given",
    "",
  ]
  rest = [arg for arg in argv if arg not in _HELP]
  if not any(map(_CONFIG.match, rest)):
    text.append(f"Config files: {_config_files()}.")
    text.append("With --config=FILE, --help lists the fields of that file.")
    return "\n".join(text)
  config, _ = parse(rest)
  text.append("Fields, with their values:")
  text += [
    f"  --config.{name}={'' if value is None else value}"
    for name, value in config_fields(config).items()
  ]
  return "\n".join(text)


def _config_files() -> str:
  return ", ".join(sorted(map(str, pathlib.Path("configs").glob("*.py"))))


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def _cpu_model() -> str:
  """What the host's processor calls itself; its architecture if unknown."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    text = ""
  match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
  return match[1] if match else platform.machine()


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _write_json(path: pathlib.Path, value: Mapping) -> None:
  """Writes the whole file or nothing."""
  new = path.with_suffix(".new")
  new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  new.replace(path)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
