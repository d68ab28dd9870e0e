"""Runs an experiment on a Kubernetes cluster, as an Indexed Job.

    python -m experiments.launch.kubernetes --name=quickstart --num_processes=4
      --image=registry.example/infinite-llm:1 --gpus_per_process=1
      --claim=shared --
      --config=configs/quickstart.py --config.cluster.platform=gpu
      --workdir=/shared/quickstart

Applies a headless Service, under whose names the pods find each other, a Secret
and the Job, of one pod a process; `--dry_run` prints them instead (JSON, as
`kubectl apply -f -` takes it). `--jobset` wraps the Job into a JobSet, whose
controller starts all pods anew together. What follows `--` is the command line
of `experiments.run`. The image has this repository as its working directory;
the volume claim is mounted at `/shared`, for the workdir and checkpoints. It
must be one that all pods can write at once. Without one, or with a workdir
elsewhere, the journal and the results are lost with a pod: the launcher warns
of that.

A pod that dies takes its group along: the others end with status 75 and are
started again with it, wherever there is room for them, so the group keeps its
size. An experiment with a journal in its workdir goes on where it was. A
process that ends with an error of its own ends the Job (`podFailurePolicy`).
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

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

_MOUNT = "/shared"
_SHM = "/dev/shm"
_NO_RETRY = (1, 2)
"""Statuses of a process that ended with an error of its own."""


def main(argv: Sequence[str]) -> int:
  """Applies the manifests, or prints them.

  Args:
    argv: The command line, program name first.

  Returns:
    The exit status: that of `kubectl`.
  """
  if asks_for_help(argv):
    print(help_text(__doc__, _flags()))
    return 0
  try:
    own, command = split_command(argv)
    values = _parse(own)
    manifests = make_manifests(values, command)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  _warn_of_loss(values, command)
  if values.dry_run:
    print(json.dumps(manifests, indent=2))
    return 0
  # Never printed: whoever has it can join the group.
  secret = _object(
    "v1",
    "Secret",
    values.name,
    stringData={"secret": secrets.token_hex(16)},
  )
  manifests["items"].append(secret)
  return subprocess.run(
    ["kubectl", "apply", "-f", "-"],
    input=json.dumps(manifests),
    text=True,
    check=False,
  ).returncode


def _warn_of_loss(values: flags.FlagValues, command: Command) -> None:
  """Says so if the workdir is in a container, and goes with it."""
  if not values.claim:
    rule = "--claim should be given"
  elif not command.workdir.is_relative_to(_MOUNT):
    rule = f"--workdir should be in {_MOUNT}, where --claim is mounted"
  else:
    return
  print(
    f"warning: {rule}; got --workdir={command.workdir} in each pod. What one"
    " writes there no other can read, results and the journal are lost with"
    " it, and a group that starts again begins anew.",
    file=sys.stderr,
  )


def make_manifests(
  values: flags.FlagValues, command: Command
) -> dict[str, Any]:
  """The Service and the Job, or JobSet, as one list.

  Args:
    values: Flags of the launcher.
    command: What each process runs.

  Raises:
    ConfigError: If the processes do not come out even.
  """
  command.instances_per_process(values.num_processes)
  name = values.name
  labels = {"app": name}
  service = _object(
    "v1",
    "Service",
    name,
    spec={
      "clusterIP": "None",
      "selector": labels,
      # They look for each other before any is ready.
      "publishNotReadyAddresses": True,
    },
  )
  job_spec = {
    "completionMode": "Indexed",
    "completions": values.num_processes,
    "parallelism": values.num_processes,
    "backoffLimit": values.max_restarts * values.num_processes,
    # To try again would give the same.
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {"operator": "In", "values": list(_NO_RETRY)},
        }
      ]
    },
    "template": {
      "metadata": {"labels": labels},
      "spec": _pod_spec(values, command),
    },
  }
  if values.jobset:
    # A JobSet puts its own name and the job's before the index.
    job = _object(
      "jobset.x-k8s.io/v1alpha2",
      "JobSet",
      name,
      spec={
        "failurePolicy": {
          "maxRestarts": values.max_restarts,
          "rules": [
            {
              "action": "FailJobSet",
              "onJobFailureReasons": ["PodFailurePolicy"],
            }
          ],
        },
        "network": {"enableDNSHostnames": True, "subdomain": name},
        "replicatedJobs": [
          {
            "name": "process",
            "replicas": 1,
            "template": {"spec": job_spec | {"backoffLimit": 0}},
          }
        ],
      },
    )
  else:
    job = _object("batch/v1", "Job", name, spec=job_spec)
  return {"apiVersion": "v1", "kind": "List", "items": [service, job]}


def _pod_spec(values: flags.FlagValues, command: Command) -> dict[str, Any]:
  first = f"{values.name}-process-0" if values.jobset else values.name
  resources = {"cpu": str(values.cpus_per_process)}
  if values.gpus_per_process:
    resources["nvidia.com/gpu"] = str(values.gpus_per_process)
  container = {
    "name": "process",
    "image": values.image,
    "command": ["python", "-m", "experiments.run", *command.args],
    "env": [
      {
        "name": "INFINITE_LLM_PROCESS",
        "valueFrom": {
          "fieldRef": {
            "fieldPath": "metadata.annotations"
            "['batch.kubernetes.io/job-completion-index']"
          }
        },
      },
      {
        "name": "INFINITE_LLM_NUM_PROCESSES",
        "value": str(values.num_processes),
      },
      {
        "name": "INFINITE_LLM_COORDINATOR",
        "value": f"{first}-0.{values.name}:{values.port}",
      },
      {
        "name": "INFINITE_LLM_HOST",
        "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}},
      },
      {
        "name": "INFINITE_LLM_SECRET",
        "valueFrom": {"secretKeyRef": {"name": values.name, "key": "secret"}},
      },
    ],
    "resources": {"limits": resources},
  }
  # NCCL wants more shared memory than the 64 MiB that containers have.
  volumes = [(_SHM, {"name": "shm", "emptyDir": {"medium": "Memory"}})]
  if values.claim:
    claim = {"claimName": values.claim}
    shared = {"name": "shared", "persistentVolumeClaim": claim}
    volumes.append((_MOUNT, shared))
  container["volumeMounts"] = [
    {"name": volume["name"], "mountPath": path} for path, volume in volumes
  ]
  return {
    "subdomain": values.name,
    "restartPolicy": "Never",
    "containers": [container],
    "volumes": [volume for _, volume in volumes],
  }


def _object(
  api: str, kind: str, name: str, **fields: Mapping[str, Any]
) -> dict[str, Any]:
  return {
    "apiVersion": api,
    "kind": kind,
    "metadata": {"name": name},
    **fields,
  }


def _flags() -> flags.FlagValues:
  values = cluster_flags()
  for name, default, text in (
    ("name", "infinite-llm", "Name of everything that is made."),
    (
      "image",
      None,
      "Image with this repository and its environment; must be given.",
    ),
    ("claim", None, f"Volume claim to mount at {_MOUNT}."),
  ):
    flags.DEFINE_string(name, default, text, flag_values=values)
  flags.DEFINE_bool("jobset", False, "Make a JobSet.", flag_values=values)
  return values


def _parse(argv: Sequence[str]) -> flags.FlagValues:
  parsed = parse_flags(argv, _flags())
  if not parsed.image:
    raise ConfigError("--image must be given; it is not.")
  return parsed


if __name__ == "__main__":
  sys.exit(main(sys.argv))
