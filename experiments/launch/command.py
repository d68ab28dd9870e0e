"""The command line that all processes of a group run."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import run
from infinite_llm.errors import ConfigError

_HELP = frozenset({"-h", "-help", "--help", "--helpshort", "--helpfull"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """A command line of `experiments.run` that was read once.

  Attributes:
    args: The arguments.
    num_instances: What it says of `config.cluster.num_instances`.
    tensor_parallel: What it says of `config.cluster.tensor_parallel`.
    platform: What it says of `config.cluster.platform`.
    workdir: Where results go, and what the experiment builds for itself.
  """

  args: tuple[str, ...]
  num_instances: int
  tensor_parallel: int
  platform: str
  workdir: pathlib.Path

  def instances_per_process(self, num_processes: int) -> int:
    """How many instances each of so many processes has.

    Raises:
      ConfigError: If they do not come out even.
    """
    share, rest = divmod(self.num_instances, num_processes)
    if rest or not share:
      raise ConfigError(
        "--num_processes must divide config.cluster.num_instances, since each"
        f" process has as many; got {num_processes} for {self.num_instances}."
      )
    return share


def launcher_flags() -> flags.FlagValues:
  """Flags that all launchers have."""
  values = flags.FlagValues()
  flags.DEFINE_integer(
    "num_processes",
    None,
    "Processes; must be given.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_bool(
    "dry_run", False, "Only print what would start.", flag_values=values
  )
  return values


def cluster_flags() -> flags.FlagValues:
  """Flags of launchers that ask a scheduler for nodes."""
  values = launcher_flags()
  for name, default, text in (
    ("cpus_per_process", 16, "Processor cores of each."),
    ("port", 12321, "Where process 0 listens; the next one is used too."),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=1, flag_values=values)
  for name, default, text in (
    ("gpus_per_process", 0, "GPUs of each process."),
    ("max_restarts", 3, "How often a group that broke is started again."),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)
  return values


def parse_flags(
  argv: Sequence[str], values: flags.FlagValues
) -> flags.FlagValues:
  """Reads a launcher's own flags.

  Args:
    argv: Its part of the command line.
    values: Has them defined; those of `launcher_flags` among them.

  Raises:
    ConfigError: If one does not exist, or has a wrong value, or is missing.
  """
  try:
    _, *extra = values(list(argv))
  except flags.Error as error:
    raise ConfigError(str(error)) from error
  if extra:
    raise ConfigError(
      f"Arguments of the experiment must follow `--`; got {extra[0]!r} before."
    )
  if values.num_processes is None:
    raise ConfigError("--num_processes must be given; it is not.")
  return values


def asks_for_help(argv: Sequence[str]) -> bool:
  """Whether a command line asks what the launcher itself can do."""
  own = itertools.takewhile(lambda each: each != "--", argv[1:])
  return not _HELP.isdisjoint(own)


def help_text(about: str | None, values: flags.FlagValues) -> str:
  """What `--help` prints.

  Args:
    about: Docstring of the launcher.
    values: Has its flags defined.
  """
  lines = [(about or "").strip(), "", "Flags:"]
  for name in sorted(values):
    flag = values[name]
    default = "" if flag.default is None else f" Default: {flag.default}."
    lines.append(f"  --{name}: {flag.help}{default}")
  return "\n".join(lines)


def split_command(argv: Sequence[str]) -> tuple[list[str], Command]:
  """Parts a launcher's own arguments from those of the experiment.

  Args:
    argv: The launcher's command line, with a `--` in it.

  Returns:
    What is before the `--`, and what is behind.

  Raises:
    ConfigError: If there is no `--`, or the experiment's arguments are wrong.
  """
  if "--" not in argv:
    raise ConfigError(
      "The experiment's arguments must follow `--`; there is none."
    )
  at = list(argv).index("--")
  args = tuple(argv[at + 1 :])
  config, workdir = run.parse(["experiments.run", *args])
  run.check_cluster(config)
  return list(argv[:at]), Command(
    args=args,
    num_instances=config.cluster.num_instances,
    tensor_parallel=config.cluster.tensor_parallel,
    platform=config.cluster.platform,
    workdir=workdir,
  )
