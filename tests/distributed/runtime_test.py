"""A process's place in its group, and what is wrong with one."""

import threading
import types

import jax
import pytest

from infinite_llm.distributed import group_link, runtime
from infinite_llm.distributed.runtime import (
  GroupOptions,
  ProcessGroup,
  current_group,
)
from infinite_llm.errors import ConfigError, GroupError

GIVEN = {
  "INFINITE_LLM_PROCESS": "2",
  "INFINITE_LLM_NUM_PROCESSES": "4",
  "INFINITE_LLM_COORDINATOR": "node-0:1234",
}


def options(**changed):
  values = {"process": 0, "num_processes": 2, "coordinator": "127.0.0.1:9000"}
  return GroupOptions(**values | changed)


class TestEnvironment:
  def test_it_says_all(self):
    more = {
      "INFINITE_LLM_HOST": "node-2",
      "INFINITE_LLM_SECRET": "0123456789abcdef",
      "INFINITE_LLM_START_TIMEOUT_S": "7",
      "INFINITE_LLM_SILENCE_S": "3",
    }
    assert GroupOptions.from_environment(GIVEN | more) == GroupOptions(
      process=2,
      num_processes=4,
      coordinator="node-0:1234",
      host="node-2",
      secret=b"0123456789abcdef",
      start_timeout_s=7.0,
      silence_s=3.0,
    )

  def test_a_process_that_is_alone(self):
    assert GroupOptions.from_environment({"PATH": "/bin"}) is None
    alone = {
      "INFINITE_LLM_PROCESS": "0",
      "INFINITE_LLM_NUM_PROCESSES": "1",
      "INFINITE_LLM_COORDINATOR": "node-0:1234",
    }
    assert GroupOptions.from_environment(alone) is None

  @pytest.mark.parametrize("name", GIVEN)
  def test_one_that_is_missing_is_named(self, name):
    rest = {key: value for key, value in GIVEN.items() if key != name}
    with pytest.raises(ConfigError, match=rf"{name} must be set beside"):
      GroupOptions.from_environment(rest)

  @pytest.mark.parametrize(
    ("name", "value"),
    [
      ("INFINITE_LLM_PROCESS", "two"),
      ("INFINITE_LLM_NUM_PROCESSES", "-4"),
      ("INFINITE_LLM_START_TIMEOUT_S", ""),
      ("INFINITE_LLM_SILENCE_S", "long"),
    ],
  )
  def test_one_that_is_no_number_is_named(self, name, value):
    message = rf"{name} must be a number; got '{value}'\."
    with pytest.raises(ConfigError, match=message):
      GroupOptions.from_environment(GIVEN | {name: value})


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"num_processes": 1}, r"num_processes must be at least 2; got 1\."),
    ({"process": 2}, r"process must be in \[0, 2\); got 2\."),
    ({"coordinator": "node-0"}, r"coordinator must be host:port; got 'node-0'"),
    ({"coordinator": "node-0:65535"}, r"port with another one after it; got"),
    ({"start_timeout_s": 0}, r"start_timeout_s must be positive; got 0\."),
    ({"silence_s": -1}, r"silence_s must be positive; got -1\."),
  ],
)
def test_impossible_options_are_refused(changed, message):
  with pytest.raises(ConfigError, match=message):
    options(**changed)


class TestMeeting:
  """What processes do together at the start, with a link of which we decide."""

  GONE = "Process 1 is gone."

  def meet(self, lost, error=None):
    def start():
      if error is not None:
        raise error

    runtime._while_all_are_there(types.SimpleNamespace(lost=lost), start)

  def test_all_are_there(self):
    self.meet(None)

  def test_one_that_is_gone_is_named(self):
    with pytest.raises(GroupError, match=r"Process 1 is gone\. JAX had not"):
      self.meet(self.GONE)

  def test_nobody_waits_for_one_that_is_gone(self):
    link, waits = types.SimpleNamespace(lost=self.GONE), threading.Event()
    with pytest.raises(GroupError, match=r"Process 1 is gone\."):
      runtime._while_all_are_there(link, waits.wait)
    waits.set()

  def test_an_error_of_ones_own_is_told_whoever_else_is_gone(self):
    with pytest.raises(ConfigError, match="wrong platform"):
      self.meet(self.GONE, ConfigError("wrong platform"))

  def test_jax_may_notice_first_that_one_is_gone(self):
    error = jax.errors.JaxRuntimeError("barrier")
    with pytest.raises(GroupError, match=r"Process 1 is gone\.") as raised:
      self.meet(self.GONE, error)
    assert raised.value.__cause__ is error

  def test_what_jax_says_is_told_where_nobody_is_gone(self, monkeypatch):
    monkeypatch.setattr(group_link, "_GRACE_S", 0.1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="barrier"):
      self.meet(None, jax.errors.JaxRuntimeError("barrier"))


def test_every_process_has_as_many_instances():
  message = r"multiple of num_processes, .*; got 3 with 2 processes\."
  with pytest.raises(ConfigError, match=message):
    ProcessGroup(
      options(), {}, platform="cpu", num_instances=3, tensor_parallel=1
    )
  assert current_group() is None
