"""The command line that all processes of a group run."""

import dataclasses
from collections.abc import Sequence

from experiments import run
from infinite_llm.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """A command line of `experiments.run` that was read once.

  Attributes:
    args: The arguments.
    num_instances: What it says of `config.cluster.num_instances`.
    tensor_parallel: What it says of `config.cluster.tensor_parallel`.
  """

  args: tuple[str, ...]
  num_instances: int
  tensor_parallel: int


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
  config, _ = run.parse(["experiments.run", *args])
  if "cluster" not in config:
    raise ConfigError(
      "config.experiment must be one that runs on a cluster; got"
      f" {config.experiment!r}."
    )
  return list(argv[:at]), Command(
    args=args,
    num_instances=config.cluster.num_instances,
    tensor_parallel=config.cluster.tensor_parallel,
  )
