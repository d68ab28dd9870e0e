"""A lending group in real processes: its tokens, its refusals and its end."""

import re
import socket

import pytest

from infinite_llm.distributed.group_end import BROKEN_GROUP
from tests.multihost.batch_job import (
  NUM_REQUESTS,
  BatchJob,
  write_requests,
  write_requests_of,
)

pytestmark = pytest.mark.multihost

_SOON_S = 10.0


@pytest.fixture(scope="module", name="requests")
def _requests(tmp_path_factory):
  path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
  write_requests(path)
  return path


@pytest.fixture(scope="module", name="answers")
def _answers(tmp_path_factory, requests):
  """Those of a single process."""
  job = BatchJob(tmp_path_factory.mktemp("single"), requests)
  assert job.run(1)["books_correct"]
  answers = job.answers()
  assert [len(tokens) for tokens in answers] == [
    24 + n for n in range(NUM_REQUESTS)
  ]
  return answers


@pytest.mark.parametrize("num_processes", [2, 4])
def test_tokens_are_those_of_a_single_process(
  num_processes, requests, answers, tmp_path
):
  job = BatchJob(tmp_path, requests)
  result = job.run(num_processes)
  assert job.answers() == answers
  assert result["finish_reasons"] == {"length": NUM_REQUESTS}
  assert result["blocks_moved"] > 0
  assert result["late_compiles"] == 0
  assert result["books_correct"]


def test_a_context_beyond_all_hbm_has_host_memory_in_any_process(tmp_path):
  """Of 2,000 tokens 896 fit in all HBM, so processes agree on layers."""
  requests = tmp_path / "requests.jsonl"
  write_requests(requests, most_tokens=2000)
  roomy = BatchJob(tmp_path / "roomy", requests)
  roomy.run(1, "--config.cache.num_blocks=128")
  job = BatchJob(tmp_path / "job", requests)
  result = job.run(
    2,
    "--config.cluster.num_instances=2",
    "--config.cache.host_blocks=70",
    "--config.cache.host_attention=True",
    "--config.cache.verify_moves=True",
  )
  assert job.answers() == roomy.answers()
  assert result["blocks_moved"] > 0
  for kind in ("layered_group_prefill", "layered_group_decode"):
    assert result["program_launches"][kind] > 0
  assert result["late_compiles"] == 0
  assert result["books_correct"]


def test_the_youngest_of_a_stalled_group_waits_until_another_ended(tmp_path):
  """Else it takes again what it gave up, before the others can borrow it.

  Three grow until nobody lends any more, with a request beyond all HBM on the
  last instance, which is the other process's.
  """
  requests, sizes = tmp_path / "requests.jsonl", [(200, 550)] * 3 + [(2230, 60)]
  write_requests_of(requests, sizes)
  roomy = BatchJob(tmp_path / "roomy", requests)
  roomy.run(1, "--config.cache.num_blocks=128")
  job = BatchJob(tmp_path / "job", requests)
  result = job.run(
    2,
    "--config.cache.host_blocks=65",
    "--config.cache.host_attention=True",
  )
  assert job.answers() == roomy.answers()
  gave_up = re.findall(r"; (\S+) gives its own up\.", job.log())
  assert gave_up
  assert len(set(gave_up)) == len(gave_up) < len(sizes)
  assert result["finish_reasons"] == {"length": len(sizes)}
  assert result["books_correct"]


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory):
  """A single process's job of requests that two instances have room for."""
  folder = tmp_path_factory.mktemp("whole")
  # One instance has room for most, but not for the longest.
  write_requests(folder / "requests.jsonl", most_tokens=700)
  job = BatchJob(folder / "job", folder / "requests.jsonl")
  job.run(1)
  return job


@pytest.mark.parametrize(
  ("num_processes", "num_instances", "victim"),
  [(2, 4, 0), (2, 4, 1), (3, 3, 1)],
)
def test_a_killed_process_is_noticed_and_its_requests_are_replayed(
  num_processes, num_instances, victim, whole, tmp_path
):
  """Those that are left form a group again, if there is more than one."""
  num_left = num_processes - 1
  job = BatchJob(tmp_path, whole.requests)
  flag = f"--config.cluster.num_instances={num_instances}"
  launcher = job.start(num_processes, flag, max_restarts=1)
  assert job.kill(launcher, victim) < _SOON_S
  assert launcher.wait(600) == 0, job.log()
  message = f"Process(es) {victim} died; starting again with {num_left}."
  assert message in job.log()
  result = job.result()
  assert result["num_instances"] == 2
  assert result["num_ended_before"] >= 3
  assert result["num_replayed"] > 0
  assert result["finish_reasons"] == {"length": NUM_REQUESTS}
  assert job.answers() == whole.answers()
  assert result["books_correct"]


def test_an_accepted_request_that_fits_no_more_ends_with_an_error(tmp_path):
  requests = tmp_path / "requests.jsonl"
  write_requests(requests, most_tokens=1400)  # More than two instances hold.
  job = BatchJob(tmp_path / "job", requests)
  launcher = job.start(2, "--config.requests.num_in_flight=18", max_restarts=1)
  job.kill(launcher, 1)
  assert launcher.wait(600) == 0, job.log()
  reasons = job.result()["finish_reasons"]
  assert reasons["length"] + reasons.get("error", 0) == NUM_REQUESTS


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def test_a_process_of_another_configuration_is_told_which_field(
  requests, tmp_path
):
  job, port = BatchJob(tmp_path, requests), free_port()
  leader = job.start_alone(0, port, timeout_s=40)
  member = job.start_alone(1, port, "--config.cache.num_blocks=17")
  text, _ = member.communicate(timeout=60)
  assert member.returncode == 2
  message = (
    r"error: config\.cache\.num_blocks must be alike in all processes; got 16"
    r" in process 0 and 17 in process 1\."
  )
  assert re.search(message, text), text
  # The right one may still come, but nobody does.
  text, _ = leader.communicate(timeout=90)
  assert leader.returncode == BROKEN_GROUP
  assert "of process(es) 1 nothing was heard" in text


def test_a_process_without_a_leader_gives_up(requests, tmp_path):
  job = BatchJob(tmp_path, requests)
  member = job.start_alone(1, free_port(), timeout_s=3)
  text, _ = member.communicate(timeout=60)
  assert member.returncode == BROKEN_GROUP
  assert re.search(r"Process 1 found no process 0 at .* within 3 s\.", text)


# Longer than XLA waits where devices have a collective for the first time.
_COMPILES_FOR_LONG = """
import sys, time
from experiments import run
from infinite_llm.engine.engine import Engine

warm_up = Engine.warm_up

def late(*args):
  time.sleep(45)
  warm_up(*args)

Engine.warm_up = late
sys.exit(run.main(sys.argv))
"""


def test_a_process_may_compile_for_longer_than_the_others(
  requests, answers, tmp_path
):
  job, port = BatchJob(tmp_path, requests), free_port()
  slow = job.start_alone(1, port, program=("-c", _COMPILES_FOR_LONG))
  leader = job.start_alone(0, port)
  text, _ = leader.communicate(timeout=300)
  assert leader.returncode == 0, text
  text, _ = slow.communicate(timeout=30)
  assert slow.returncode == 0, text
  assert job.answers() == answers


# Not before the other one is there, too, and waits: that calls process 0.
_DIES_WHERE_JAX_STARTS = """
import os, socket, sys, time
from experiments import run
from infinite_llm.distributed import runtime

def die(options, platform):
  host, _, port = options.coordinator.rpartition(":")
  address = host, int(port) + runtime._JAX_PORT_OFFSET
  if options.process == 0:
    socket.create_server(address).accept()
  else:
    while socket.socket().connect_ex(address):
      time.sleep(0.1)
  os._exit(9)

runtime._start_jax = die
sys.exit(run.main(sys.argv))
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_before_jax_starts_is_noticed(
  victim, requests, tmp_path
):
  """JAX would wait for it until its timeout."""
  job, port = BatchJob(tmp_path, requests), free_port()
  dying = job.start_alone(
    victim, port, timeout_s=300, program=("-c", _DIES_WHERE_JAX_STARTS)
  )
  other = job.start_alone(1 - victim, port, timeout_s=300)
  text, _ = other.communicate(timeout=120)
  dying.communicate(timeout=10)
  assert dying.returncode == 9
  assert other.returncode == BROKEN_GROUP, text
  message = rf"Process {victim} is gone\. JAX had not started in all processes"
  assert re.search(message, text), text
