"""Launchers: what they would start, and what they do when a node is gone."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from experiments.launch import kubernetes, local, slurm

COMMAND = ("--", "--config=configs/quickstart.py", "--workdir=/shared/q s")
_PROCESS = """\
#!/usr/bin/env python3
import json, os, sys
names = ("PROCESS", "NUM_PROCESSES", "COORDINATOR")
said = {name: os.environ["INFINITE_LLM_" + name] for name in names}
said["has_secret"] = len(os.environ["INFINITE_LLM_SECRET"]) == 32
said["args"] = sys.argv[1:]
with open(os.environ["SAID"], "a") as file:
  file.write(json.dumps(said) + "\\n")
if said["NUM_PROCESSES"] == os.environ["BREAKS_WITH"]:
  statuses = json.loads(os.environ["STATUSES"])
  sys.exit(statuses[int(said["PROCESS"])])
"""
_MEMBER = """\
import json, os, signal, sys, time
me = int(os.environ["INFINITE_LLM_PROCESS"])
size = int(os.environ["INFINITE_LLM_NUM_PROCESSES"])
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
said = {"pid": os.getpid(), "size": size, "gpu": gpu}
with open(os.environ["SAID"], "a") as file:
  file.write(json.dumps(said) + "\\n")
while open(os.environ["SAID"]).read().count(f'"size": {size},') < size:
  time.sleep(0.01)  # All begin together, however busy the machine is.
deeds = json.loads(os.environ["DEEDS"])
for deed in deeds[me] if size == len(deeds) else ():
  if isinstance(deed, str):
    os.kill(os.getpid(), getattr(signal, deed))
  elif deed < 0:
    time.sleep(-deed)
  else:
    sys.exit(deed)
"""
_LOCAL_LAUNCHER = """\
import sys
from experiments.launch import local
local._process_command = lambda args: [sys.executable, sys.argv[1]]
sys.exit(local.main(["launcher", *sys.argv[2:]]))
"""
_ENDED_MEANWHILE = """\
import os, signal, subprocess
from experiments.launch import local

class Popen(subprocess.Popen):
  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    print(self.pid, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

subprocess.Popen = Popen
"""
_SRUN = """\
#!/usr/bin/env python3
import os, subprocess, sys
args = sys.argv[1:]
options = {}
while args[0].startswith("--"):
  name, _, value = args.pop(0).partition("=")
  options[name] = value
nodes = options["--nodelist"].split(",")
assert len(nodes) == int(options["--nodes"])
if "--immediate" in options:
  sys.exit(1 if nodes == [os.environ["GONE"]] else 0)
assert options["--cpus-per-task"] == "16"
assert options["--kill-on-bad-exit"] == "0"
assert options["--wait"] == "30"
if os.environ["STEP_FAILS"] and os.environ["GONE"] in nodes:
  sys.exit(1)  # No step with such a node, so nothing was started.
tasks = [
  subprocess.run(args, env={**os.environ, "SLURM_PROCID": str(n)})
  for n in range(int(options["--ntasks"]))
]
sys.exit(max(task.returncode for task in tasks))
"""
_SCONTROL = """\
#!/usr/bin/env bash
[ "$*" = "show hostnames nodes" ] && printf 'n0\\nn1\\nn2\\nn3\\n'
"""


def run(main, capsys, *flags, command=COMMAND):
  status = main(["launcher", *flags, *command])
  return status, *capsys.readouterr()


class TestLocal:
  def test_each_process_has_gpus_of_its_own(self, capsys, monkeypatch):
    command = (
      *COMMAND,
      "--config.cluster.platform=gpu",
      "--config.cluster.tensor_parallel=2",
    )
    flags = ("--num_processes=2", "--dry_run")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, out, _ = run(local.main, capsys, *flags, command=command)
    assert [line.split()[0] for line in out.splitlines()] == [
      "CUDA_VISIBLE_DEVICES=0,1,2,3",
      "CUDA_VISIBLE_DEVICES=4,5,6,7",
    ]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5")
    status, _, err = run(local.main, capsys, *flags, command=command)
    assert status == 2
    assert "must name at least 8 GPUs, 4 for each process; got '7,6,5'" in err

  def test_a_dry_run_prints_each_process(self, capsys):
    status, out, _ = run(
      local.main, capsys, "--num_processes=2", "--dry_run", command=COMMAND
    )
    assert status == 0
    lines = out.splitlines()
    for n, line in enumerate(lines):
      assert line.startswith(
        f"INFINITE_LLM_PROCESS={n} INFINITE_LLM_NUM_PROCESSES=2"
      )
      assert line.endswith(
        "-m experiments.run --config=configs/quickstart.py"
        " '--workdir=/shared/q s'"
      )
    assert len(lines) == 2


@pytest.fixture(name="members")
def _members(monkeypatch, tmp_path):
  """Starts a local group of scripts that do what they are told at first.

  A deed is a signal, an exit status, or how many seconds to sleep, negated.
  """
  (tmp_path / "member.py").write_text(_MEMBER)
  monkeypatch.setattr(local, "_END_S", 4.0)
  monkeypatch.setattr(
    local,
    "_process_command",
    lambda _: [sys.executable, str(tmp_path / "member.py")],
  )
  monkeypatch.setenv("SAID", str(tmp_path / "said"))
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")

  def start(*deeds):
    monkeypatch.setenv("DEEDS", json.dumps(deeds))
    flags = [f"--num_processes={len(deeds)}", "--max_restarts=3"]
    status = local.main(
      ["launcher", *flags, *COMMAND, "--config.cluster.platform=gpu"]
    )
    lines = (tmp_path / "said").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    gpus = [
      sorted(x["gpu"] for x in said if x["size"] == size)
      for size in range(len(deeds), 0, -1)
    ]
    return status, [each for each in gpus if each]

  return start


_NOTICES = (-1.0, 75)  # That another one is gone.
_IS_ABORTED = (-2.5, "SIGABRT")  # By JAX, as another one is gone.
_ALL = ["4", "5", "6", "7"]


@pytest.mark.parametrize(
  "end",
  [("SIGKILL",), ("SIGABRT",), ("SIGSEGV",), ("SIGSTOP",)],
  ids=lambda end: end[0],
)
def test_a_group_starts_again_without_who_died_and_its_gpus(members, end):
  status, gpus = members(_NOTICES, end, _NOTICES, _IS_ABORTED)
  assert (status, gpus) == (0, [_ALL, ["4", "6", "7"]])


def test_process_0_may_be_who_died(members):
  status, gpus = members(("SIGKILL",), _NOTICES, _NOTICES, _NOTICES)
  assert (status, gpus) == (0, [_ALL, ["5", "6", "7"]])


@pytest.mark.parametrize(
  ("deeds", "status"),
  [
    # An error, and what follows from it.
    (((1,), _NOTICES, _IS_ABORTED, _NOTICES), 1),
    ((_NOTICES, (1,), _NOTICES, _NOTICES), 75),
    # What came out is there; that one crashes as it leaves changes nothing.
    (((-0.5, 0), (0,), ("SIGSEGV",), (-0.5, 0)), 0),
  ],
)
def test_a_group_does_not_start_again_for_nothing(members, deeds, status):
  assert members(*deeds) == (status, [_ALL])


def test_a_launcher_that_is_ended_ends_its_processes(tmp_path):
  (tmp_path / "member.py").write_text(_MEMBER)
  said = tmp_path / "said"
  launcher = subprocess.Popen(
    [
      *(sys.executable, "-c", _LOCAL_LAUNCHER, tmp_path / "member.py"),
      *("--num_processes=2", *COMMAND, "--config.cluster.platform=gpu"),
    ],
    env={**os.environ, "SAID": str(said), "DEEDS": "[[-60], [-60]]"},
  )
  deadline_s = time.monotonic() + 60
  while not said.exists() or len(said.read_text().splitlines()) < 2:
    assert time.monotonic() < deadline_s
    time.sleep(0.05)

  launcher.terminate()

  assert launcher.wait(timeout=20) == 128 + signal.SIGTERM
  for line in said.read_text().splitlines():
    with pytest.raises(ProcessLookupError):
      os.kill(json.loads(line)["pid"], 0)


def test_a_launcher_that_is_ended_as_it_starts_processes_leaves_none(tmp_path):
  (tmp_path / "member.py").write_text("import time; time.sleep(30)")
  pids = tmp_path / "pids"
  with pids.open("w") as file:
    ended = subprocess.run(
      [
        *(sys.executable, "-c", _ENDED_MEANWHILE + _LOCAL_LAUNCHER),
        *(tmp_path / "member.py", "--num_processes=2", *COMMAND),
      ],
      stdout=file,
      check=False,
      timeout=60,
    )
  assert ended.returncode == 128 + signal.SIGTERM
  assert pids.read_text()
  for pid in pids.read_text().split():
    with pytest.raises(ProcessLookupError):
      os.kill(int(pid), 0)


@pytest.mark.parametrize("name", ["local", "slurm", "kubernetes"])
@pytest.mark.parametrize("args", [["--help"], ["--num_processes=2", "-h"]])
def test_help_tells_usage_and_flags(name, args, capsys):
  main = {"local": local, "slurm": slurm, "kubernetes": kubernetes}[name].main
  status, out, err = run(main, capsys, *args, command=())
  assert (status, err) == (0, "")
  assert f"python -m experiments.launch.{name} " in out
  for flag in ("num_processes", "dry_run", "max_restarts"):
    assert f"\n  --{flag}: " in out


@pytest.mark.parametrize(
  "main",
  [
    local.main,
    slurm.main,
    lambda a: kubernetes.main([*a[:1], "--image=x", *a[1:]]),
  ],
)
@pytest.mark.parametrize(
  ("flags", "command", "message"),
  [
    (["--num_processes=3"], COMMAND, "must divide config.cluster.num_inst"),
    ([], COMMAND, "--num_processes must be given; it is not."),
    (["--num_processes=2", "more"], COMMAND, "must follow `--`; got 'more'"),
    (["--num_processes=2"], (), "must follow `--`; there is none."),
    (
      ["--num_processes=2"],
      ("--", "--config=configs/control_plane_bench.py"),
      "that runs on a cluster, to run in several processes; got",
    ),
    (
      ["--num_processes=2"],
      (*COMMAND, "--config.sed=1"),
      "did you mean config.seed?",
    ),
  ],
)
def test_wrong_command_lines_start_nothing(
  main, flags, command, message, capsys
):
  status, out, err = run(main, capsys, *flags, command=command)
  assert (status, out) == (2, "")
  assert err.startswith("error: ")
  assert message in err


class TestSlurm:
  def test_the_processes_of_a_node_must_come_out_even(self, capsys):
    flags = ("--num_processes=4", "--processes_per_node=3", "--dry_run")
    status, _, err = run(slurm.main, capsys, *flags)
    assert status == 2
    assert "must divide --num_processes; got 3 for 4." in err

  @pytest.mark.parametrize(
    ("breaks_with", "statuses", "rounds", "ends_with"),
    [
      ("0", [], [4], 0),
      # `srun` cannot begin on a node that is down.
      ("no step", [], [3], 0),
      # A node is gone; whoever finds that out may be aborted by JAX.
      ("4", [75, 137, 75, 134], [4, 3], 0),
      ("3", [75, 75, 75], [4], 0),
      # Wrong input, or another error of its own, of process 0 or of another.
      ("4", [2, 75, 75, 134], [4], 2),
      ("4", [75, 75, 2, 75], [4], 2),
      ("4", [75, 75, 75, 1], [4], 1),
      ("4", [1, 0, 0, 0], [4], 1),
    ],
  )
  def test_the_script_goes_on_only_without_a_node_that_is_gone(
    self, breaks_with, statuses, rounds, ends_with, capsys, tmp_path
  ):
    for name, text in (
      ("process", _PROCESS),
      ("srun", _SRUN),
      ("scontrol", _SCONTROL),
    ):
      (tmp_path / name).write_text(text)
      (tmp_path / name).chmod(stat.S_IRWXU)
    status, script, _ = run(
      slurm.main,
      capsys,
      "--num_processes=4",
      "--dry_run",
      f"--python={tmp_path}/process",
      "--gpus_per_process=1",
      "--sbatch=--time=10",
    )
    assert status == 0
    assert "\n#SBATCH --gpus-per-task=1\n#SBATCH --time=10\n" in script
    said = tmp_path / "said"
    done = subprocess.run(
      ["bash", "-c", script],
      env={
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "nodes",
        "GONE": "n1",
        "SAID": str(said),
        "BREAKS_WITH": breaks_with,
        "STEP_FAILS": "1" if breaks_with == "no step" else "",
        "STATUSES": json.dumps(statuses),
      },
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == ends_with, done.stderr
    told = [json.loads(line) for line in said.read_text().splitlines()]
    assert told == [
      {
        "PROCESS": str(n),
        "NUM_PROCESSES": str(count),
        "COORDINATOR": "n0:12321",
        "has_secret": True,
        "args": [
          "-m",
          "experiments.run",
          *COMMAND[1:],
          f"--config.cluster.num_instances={count}",
        ],
      }
      for count in rounds
      for n in range(count)
    ]


class TestKubernetes:
  def manifests(self, capsys, *flags):
    status, out, _ = run(
      kubernetes.main,
      capsys,
      "--name=long",
      "--image=image:1",
      "--num_processes=4",
      "--gpus_per_process=2",
      "--claim=data",
      "--dry_run",
      *flags,
    )
    assert status == 0
    return json.loads(out)["items"]

  def environment(self, pod):
    (container,) = pod["containers"]
    return {
      each["name"]: each.get("value", each.get("valueFrom"))
      for each in container["env"]
    }

  def test_an_indexed_job(self, capsys):
    service, job = self.manifests(capsys)
    assert service["kind"] == "Service"
    assert service["spec"]["clusterIP"] == "None"
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 4
    pod = spec["template"]["spec"]
    assert spec["template"]["metadata"]["labels"] == service["spec"]["selector"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"  # Or there is no policy of it.
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule == {
      "action": "FailJob",
      "onExitCodes": {"operator": "In", "values": [1, 2]},
    }
    (container,) = pod["containers"]
    assert container["command"] == [
      "python",
      "-m",
      "experiments.run",
      *COMMAND[1:],
    ]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounted = {
      each["mountPath"]: volumes[each["name"]]
      for each in container["volumeMounts"]
    }
    assert mounted["/shared"]["persistentVolumeClaim"] == {"claimName": "data"}
    assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
    assert len(mounted) == len(volumes) == 2
    environment = self.environment(pod)
    assert environment["INFINITE_LLM_NUM_PROCESSES"] == "4"
    assert environment["INFINITE_LLM_COORDINATOR"] == "long-0.long:12321"

  def test_a_jobset_starts_all_anew_together(self, capsys):
    _, jobset = self.manifests(capsys, "--jobset", "--max_restarts=5")
    assert jobset["kind"] == "JobSet"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    # What fails the Job by its own policy is not tried again.
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert self.environment(pod)["INFINITE_LLM_COORDINATOR"] == (
      "long-process-0-0.long:12321"
    )

  def test_nobody_can_read_the_secret_from_a_dry_run(self, capsys):
    kinds = [item["kind"] for item in self.manifests(capsys)]
    assert "Secret" not in kinds

  @pytest.mark.parametrize(
    ("claims", "workdir", "warning"),
    [
      (["--claim=data"], "/shared/here", ""),
      ([], "/shared/here", "warning: --claim should be given; got --workdir="),
      (["--claim=data"], "/here", "warning: --workdir should be in /shared, "),
    ],
  )
  def test_a_workdir_that_is_lost_with_a_pod_is_warned_of(
    self, claims, workdir, warning, capsys
  ):
    flags = ("--image=image:1", "--num_processes=4", "--dry_run", *claims)
    command = ("--", "--config=configs/batch.py", f"--workdir={workdir}")
    status, out, err = run(kubernetes.main, capsys, *flags, command=command)
    assert status == 0
    assert json.loads(out)["items"]
    assert err.startswith(warning)
    assert bool(err) == bool(warning)

  def test_an_image_is_needed(self, capsys):
    status, _, err = run(kubernetes.main, capsys, "--num_processes=2")
    assert status == 2
    assert "--image must be given; it is not." in err
