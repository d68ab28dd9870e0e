"""What every row of a bench tells of its run."""

import datetime
import importlib.metadata
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin")


def run_facts(
  num_devices: int,
  packages: Sequence[str] = PACKAGES,
  device: str | None = None,
) -> dict[str, Any]:
  """Device, versions, command and date of this run.

  Args:
    num_devices: How many devices it uses.
    packages: Whose versions are told; None stands for those that lack.
    device: What kind they are; None asks JAX, which takes them for this
      process.
  """
  versions = {}
  for name in packages:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {
    "device": jax.devices()[0].device_kind if device is None else device,
    "num_devices": num_devices,
    "versions": versions,
    "command": shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]]),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
