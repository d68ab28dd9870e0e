"""The main job on a small document, and its config."""

import dataclasses
import json

import pytest

from configs.quickstart import get_config
from experiments import cluster, quickstart, run
from infinite_llm.cache_config import CacheConfig
from infinite_llm.config import LendingConfig, SchedulerConfig
from infinite_llm.engine.model_runner import ModelRunner

_SMALL = (
  "--config.show_progress=false",
  "--config.document.num_tokens=1500",
  "--config.document.num_needles=3",
  "--config.short_requests.num_tokens=64",
  "--config.cache.block_size=16",
  "--config.lending.headroom_blocks=8",
  "--config.lending.group_prefill_buckets=(128,)",
  "--config.scheduler.prefill_buckets=(128,)",
)


def _call(workdir, *args) -> int:
  return run.main(
    ["run", "--config=configs/quickstart.py", f"--workdir={workdir}", *args]
  )


@pytest.fixture(scope="module", name="finished")
def _finished_run(tmp_path_factory):
  """The folder of a run, and whose rows its group steps of a prompt had."""
  workdir = tmp_path_factory.mktemp("quickstart")
  owners = set()
  group_step = ModelRunner.group_step

  def noted(self, rows, slots, **options):
    if options["is_prefill"]:
      owners.update(instance for instance, mine in enumerate(rows) if mine)
    return group_step(self, rows, slots, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ModelRunner, "group_step", noted)
    assert _call(workdir, *_SMALL) == 0
  return workdir, owners


@pytest.fixture(name="workdir")
def _workdir(finished):
  return finished[0]


@pytest.fixture(name="result")
def _result(workdir):
  return json.loads((workdir / "result.json").read_text())


def test_the_answer_is_right_and_needs_several_creditors(result):
  assert result["correct"]
  assert result["answer"] == result["expected"]
  assert len(result["expected"]) == 3
  assert len(result["creditors"]) >= 2
  assert 0 not in result["creditors"]
  assert result["context_tokens"] > 2 * result["capacity_tokens_per_instance"]


def test_short_requests_are_right_and_prefilled_at_home(finished, result):
  assert result["short_requests_correct"]
  assert result["num_short_requests"] >= 6
  assert result["program_launches"]["group_decode"] > 0
  # The long request is the only one of instance 0.
  assert finished[1] == {0}
  assert result["instances"][0]["requests"] == 1


def test_the_books_are_closed(result):
  assert result["books_correct"]
  assert result["blocks_leaked"] == 0
  assert result["late_compiles"] == 0


def test_the_picture_is_drawn(workdir):
  assert (workdir / "rblocks.png").stat().st_size > 10_000


def test_the_config_is_kept_as_it_was_run(workdir):
  config = json.loads((workdir / "config.json").read_text())
  assert config["document"]["num_tokens"] == 1500
  assert config["cache"]["num_blocks"] is None


@pytest.mark.parametrize(
  ("section", "owner"),
  [
    ("cache", CacheConfig),
    ("lending", LendingConfig),
    ("scheduler", SchedulerConfig),
  ],
)
def test_a_section_has_every_field_of_its_dataclass(section, owner):
  fields = {field.name for field in dataclasses.fields(owner)}
  assert set(get_config()[section]) == fields


@pytest.mark.parametrize("num_instances", [1, 2, 3, 4, 8, 64])
def test_pools_together_hold_the_context_but_none_does_alone(num_instances):
  config = get_config()
  config.cluster.num_instances = num_instances
  engine = quickstart.make_engine_config(config, context_tokens=65536)
  own = engine.cache.num_blocks - 1
  lent = (own - engine.lending.headroom_blocks) * (num_instances - 1)
  assert (own + lent) * 64 >= 65536
  assert num_instances == 1 or own * 64 < 65536


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("cache.block_size=17", "block_size must be a positive multiple of 8"),
    ("cache.block_size=0", "block_size must be a positive multiple of 8"),
    ("cache.num_blocks=10", "all reachable rBlocks hold"),
    ("lending.policy=static", "all reachable rBlocks hold"),
    ("lending.policy=give", "policy must be"),
    ("cluster.num_instances=0", "num_instances must be at least 1"),
    ("document.num_tokens=3", "document: num_tokens must be at least"),
    ("document.depths=(0.1,a)", "document: depths must be numbers"),
    ("short_requests.num_tokens=3", "short_requests: num_tokens must be at le"),
    ("short_requests.num_tokens=9999", "short_requests: The prompt needs room"),
    (
      "short_requests.num_in_flight=-1",
      "short_requests: num_in_flight must not be negative; got -1.",
    ),
    (
      "cluster.platform=banana",
      "platform must be one of cpu, gpu; got 'b",
    ),
    (
      "cluster.platform=gpu",
      "platform must be what JAX runs on, cpu; got 'gpu'.",
    ),
    ("document.path=no/such/file", "path must be a readable file"),
    ("model.dtype=int4", "dtype must be one of"),
  ],
)
def test_bad_input_is_one_clear_line(
  tmp_path, workdir, capsys, monkeypatch, arg, message
):
  def load(*args, **kwargs):
    raise AssertionError("Bad input must be found before anything is loaded.")

  monkeypatch.setattr(cluster, "LLM", load)
  checkpoint = workdir / "checkpoint"
  status = _call(
    tmp_path, *_SMALL, f"--config.model.path={checkpoint}", f"--config.{arg}"
  )
  error = capsys.readouterr().err
  assert status == 2
  assert message in error
  assert error.startswith("error: ")
  assert error.count("\n") == 1


def test_a_folder_with_other_files_is_not_overwritten(tmp_path, capsys):
  (tmp_path / "notes.txt").write_text("mine")
  status = _call(tmp_path / "out", *_SMALL, f"--config.model.path={tmp_path}")
  assert status == 2
  assert "holds other files" in capsys.readouterr().err
