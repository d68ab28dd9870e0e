"""The experiment runner, with an experiment of two lines."""

import json
import pathlib
import platform
import sys
import types

import pytest

from experiments import run
from infinite_llm.errors import CapacityError, ConfigError

_CONFIG = """
import ml_collections
from ml_collections import config_dict

def get_config():
  config = ml_collections.ConfigDict()
  config.experiment = "tiny_example"
  config.answer = 42
  config.document = ml_collections.ConfigDict()
  config.document.num_tokens = 1024
  config.document.path = config_dict.placeholder(str)
  config.document.depths = (0.25, 0.75)
  config.cluster = ml_collections.ConfigDict()
  config.cluster.is_lending = True
  return config
"""


@pytest.fixture(name="seen")
def _tiny_experiment(monkeypatch):
  """Registers the experiment; gives a list of the configs that it got."""
  seen = []

  def tiny(config, workdir):
    seen.append((config, workdir))
    return {"answer": config.answer, "correct": config.answer == 42}

  module = types.ModuleType("experiments.tiny_example")
  module.run = tiny
  monkeypatch.setitem(sys.modules, module.__name__, module)
  return seen


@pytest.fixture(name="call")
def _call(tmp_path, seen, capsys):
  """Runs a command; gives exit status, output and error output."""
  path = tmp_path / "tiny.py"
  path.write_text(_CONFIG)

  def call(*args, config=path):
    workdir = tmp_path / "out"
    argv = ["run", f"--config={config}", f"--workdir={workdir}", *args]
    status = run.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err

  return call


def test_a_right_result_exits_with_0(call, seen, tmp_path):
  status, _, error = call()
  assert (status, error) == (0, "")
  assert [workdir for _, workdir in seen] == [tmp_path / "out"]


def test_a_wrong_result_exits_with_1_and_is_written(call, tmp_path):
  status, _, _ = call("--config.answer=41")
  assert status == 1
  result = json.loads((tmp_path / "out" / "result.json").read_text())
  assert result["correct"] is False


@pytest.mark.parametrize(
  ("result", "status"),
  [({}, 0), ({"books_correct": False}, 1), ({"is_correct_by": False}, 0)],
)
def test_any_part_can_be_wrong(call, monkeypatch, result, status):
  module = sys.modules["experiments.tiny_example"]
  monkeypatch.setattr(module, "run", lambda config, workdir: result)
  assert call()[0] == status


def test_the_result_says_on_what_it_ran(call, tmp_path):
  call()
  result = json.loads((tmp_path / "out" / "result.json").read_text())
  assert result["answer"] == 42
  assert result["run"]["command"].startswith("python -m experiments.run --con")
  assert result["run"]["device"]["platform"] == "cpu"
  assert result["run"]["device"]["count"] == 4
  assert result["run"]["device"]["host_cpu"]
  assert result["run"]["versions"]["jax"] == "0.11.2"
  assert result["run"]["date"].endswith("+00:00")


@pytest.mark.parametrize(
  ("args", "field", "value"),
  [
    (["--config.answer=7"], "answer", 7),
    (["--config.answer", "7"], "answer", 7),
    (["--config.document.num_tokens=65_536"], "document.num_tokens", 65536),
    (["--config.document.path=a.txt"], "document.path", "a.txt"),
    (["--config.document.depths=(0.5,)"], "document.depths", (0.5,)),
    (["--config.cluster.is_lending=false"], "cluster.is_lending", False),
    (["--noconfig.cluster.is_lending"], "cluster.is_lending", False),
  ],
)
def test_every_leaf_can_be_set(call, seen, tmp_path, args, field, value):
  call(*args)
  leaf = json.loads((tmp_path / "out" / "config.json").read_text())
  for part in field.split("."):
    leaf = leaf[part]
  assert leaf == (list(value) if isinstance(value, tuple) else value)
  config, _ = seen[0]
  assert run.config_fields(config)[field] == value


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (
      ["--config.document.num_token=1"],
      "no field config.document.num_token; did you mean"
      " config.document.num_tokens?",
    ),
    (["--config.documnt.num_tokens=1"], "mean config.document.num_tokens?"),
    (["--config.num_tokens=1"], "did you mean config.document.num_tokens?"),
    (["--noconfig.cluster.is_lendin"], "mean config.cluster.is_lending?"),
    (["--config.xyzzy=1"], "There is no field config.xyzzy; see --help."),
    (["--config.document=1"], "is a group; set one of document.depths"),
    (["--config.answer=many"], "--config.answer=many"),
    (["--wrokdir=x"], "Did you mean: workdir"),
    (["stray"], "There is no argument 'stray'"),
    (["--config.experiment=tiny_exampel"], "no experiment 'tiny_exampel'"),
    (["--config.experiment=documents"], "did you mean 'document'?"),
    (["--config.experiment=document"], "document.py is no experiment"),
  ],
)
def test_a_wrong_command_is_one_line_and_exits_with_2(
  call, seen, args, message
):
  status, output, error = call(*args)
  assert status == 2
  assert error.startswith("error: ")
  assert message in error
  assert error.count("\n") == 1
  assert (output, seen) == ("", [])


def test_a_missing_config_file_is_named(call):
  status, _, error = call(config="no/such/file.py")
  assert status == 2
  assert "no/such/file.py" in error
  assert error.count("\n") == 1


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:", "must be a Python file"),
    ("config = {}", "must have a get_config()"),
    ("get_config = dict", "must have a get_config()"),
    (
      "from ml_collections import ConfigDict as get_config",
      "must set config.experiment",
    ),
  ],
)
def test_a_file_that_is_no_config_is_refused(call, tmp_path, text, message):
  path = tmp_path / "odd.py"
  path.write_text(text)
  status, _, error = call(config=path)
  assert status == 2
  assert message in error
  assert error.count("\n") == 1


def test_a_command_without_config_says_so(seen, capsys):
  assert run.main(["run"]) == 2
  assert "--config must name a config file" in capsys.readouterr().err


@pytest.mark.parametrize("error_type", [ConfigError, CapacityError])
def test_an_expected_error_is_one_line(call, monkeypatch, tmp_path, error_type):
  call()

  def refuse(config, workdir):
    raise error_type("needs 5 tokens,\nhas 3")

  monkeypatch.setattr(sys.modules["experiments.tiny_example"], "run", refuse)
  status, _, error = call()
  assert (status, error) == (2, "error: needs 5 tokens, has 3\n")
  # The result of the run before is not taken for that of this one.
  assert not (tmp_path / "out" / "result.json").exists()


def test_a_bug_is_not_hidden(call, monkeypatch):
  def fail(config, workdir):
    raise ZeroDivisionError

  monkeypatch.setattr(sys.modules["experiments.tiny_example"], "run", fail)
  with pytest.raises(ZeroDivisionError):
    call()


def test_a_workdir_that_is_a_file_is_refused(call, tmp_path):
  (tmp_path / "out").write_text("")
  status, _, error = call()
  assert status == 2
  assert "workdir must be a folder" in error


def test_help_lists_the_fields(call, seen):
  status, output, error = call("--help", "--config.answer=5")
  assert (status, error, seen) == (0, "", [])
  assert "--config.FIELD=VALUE" in output
  assert "--config.answer=5\n" in output
  assert "--config.document.path=\n" in output


def test_help_alone_says_how_to_go_on(capsys):
  assert run.main(["run", "--help"]) == 0
  output = capsys.readouterr().out
  assert "python -m experiments.run --config=" in output
  assert "--help lists the fields" in output


@pytest.mark.parametrize(
  ("text", "model"),
  [
    (
      "processor\t: 0\nmodel name\t: Some CPU 3 @ 2 GHz\nmodel name\t: B\n",
      "Some CPU 3 @ 2 GHz",
    ),
    ("processor\t: 0\nBogoMIPS\t: 50\n", platform.machine()),
  ],
)
def test_the_processor_has_a_name(monkeypatch, text, model):
  monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: text)
  assert run._cpu_model() == model
