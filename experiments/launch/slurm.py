"""Runs an experiment on nodes of a SLURM cluster.

    python -m experiments.launch.slurm --num_processes=4 --gpus_per_process=1 --
      --config=configs/quickstart.py --config.cluster.platform=gpu
      --workdir=/shared/quickstart

Submits a batch job of `srun` tasks, a process each; `--dry_run` prints the
script instead. What follows `--` is the command line of `experiments.run`; the
workdir, the checkpoint and this repository must be in folders that all nodes
share. Instances are shared out in the order of the tasks.

The allocation outlives a node (`--no-kill`). When a process dies, the others
end by themselves; the script then asks every node whether it is there and
starts the group again on those that are, with as many fewer instances. If any
process ends with an error of its own, as for wrong input, so does the job: the
same would happen again. Who still waits for others is ended after half a
minute.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from experiments.launch.command import (
  Command,
  asks_for_help,
  cluster_flags,
  help_text,
  parse_flags,
  split_command,
)
from infinite_llm.errors import ConfigError

_SCRIPT = """\
#!/usr/bin/env bash
{directives}
set -uo pipefail

export INFINITE_LLM_SECRET="${{INFINITE_LLM_SECRET:-$(openssl rand -hex 16)}}"
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
for ((restarts = 0; ; restarts++)); do
  tasks=$((${{#nodes[@]}} * {per_node}))
  export INFINITE_LLM_NUM_PROCESSES=$tasks
  export INFINITE_LLM_COORDINATOR="${{nodes[0]}}:{port}"
  srun --nodelist="$(IFS=,; echo "${{nodes[*]}}")" --nodes="${{#nodes[@]}}" \\
    --ntasks="$tasks" --ntasks-per-node={per_node} \\
    --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait={end_s} \\
    bash -c '
      INFINITE_LLM_PROCESS=$SLURM_PROCID "$@"
      status=$?
      if ((status == 1 || status == 2)); then
        exit $((status + {own_error}))
      fi
      exit "$status"' process \\
    {command} \\
    --config.cluster.num_instances=$((tasks * {share}))
  status=$?
  if ((status == 1 + {own_error} || status == 2 + {own_error})); then
    exit $((status - {own_error}))
  fi
  if ((status == 0 || restarts == {max_restarts})); then
    exit "$status"
  fi
  alive=()
  for node in "${{nodes[@]}}"; do
    if srun --nodelist="$node" --nodes=1 --ntasks=1 --immediate=60 true; then
      alive+=("$node")
    fi
  done
  if ((${{#alive[@]}} == 0)); then
    exit "$status"
  fi
  nodes=("${{alive[@]}}")
  echo "Status $status; starting again on ${{nodes[*]}}." >&2
done
"""

_OWN_ERROR = 252
"""Added to statuses 1 and 2 of processes. `srun` gives the highest status of
all, and the others end with 75 or, aborted by JAX, with 134."""

_END_S = 30
"""How long processes may go on when the first one has ended."""


def main(argv: Sequence[str]) -> int:
  """Submits the job, or prints it.

  Args:
    argv: The command line, program name first.

  Returns:
    The exit status: that of `sbatch`.
  """
  if asks_for_help(argv):
    print(help_text(__doc__, _flags()))
    return 0
  try:
    own, command = split_command(argv)
    values = parse_flags(own, _flags())
    script = make_script(values, command)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  if values.dry_run:
    print(script, end="")
    return 0
  return subprocess.run(
    ["sbatch"], input=script, text=True, check=False
  ).returncode


def make_script(values: flags.FlagValues, command: Command) -> str:
  """The batch script.

  Args:
    values: Flags of the launcher.
    command: What each process runs.

  Raises:
    ConfigError: If the processes do not come out even.
  """
  share = command.instances_per_process(values.num_processes)
  nodes, rest = divmod(values.num_processes, values.processes_per_node)
  if rest:
    raise ConfigError(
      "--processes_per_node must divide --num_processes; got"
      f" {values.processes_per_node} for {values.num_processes}."
    )
  options = [
    "--job-name=infinite-llm",
    "--no-kill",
    f"--nodes={nodes}",
    f"--ntasks={values.num_processes}",
    f"--ntasks-per-node={values.processes_per_node}",
    f"--cpus-per-task={values.cpus_per_process}",
  ]
  if values.gpus_per_process:
    options.append(f"--gpus-per-task={values.gpus_per_process}")
  options += values.sbatch
  return _SCRIPT.format(
    directives="\n".join(f"#SBATCH {option}" for option in options),
    per_node=values.processes_per_node,
    cpus=values.cpus_per_process,
    end_s=_END_S,
    own_error=_OWN_ERROR,
    port=values.port,
    share=share,
    max_restarts=values.max_restarts,
    command=shlex.join([values.python, "-m", "experiments.run", *command.args]),
  )


def _flags() -> flags.FlagValues:
  values = cluster_flags()
  flags.DEFINE_integer(
    "processes_per_node",
    1,
    "Processes of each node.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_string(
    "python",
    ".venv/bin/python",
    "Interpreter on the nodes.",
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    "sbatch", [], "More of sbatch, as --sbatch=--time=1:00.", flag_values=values
  )
  return values


if __name__ == "__main__":
  sys.exit(main(sys.argv))
