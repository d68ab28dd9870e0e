"""What a step sends to the devices depends on its rows, not on their length."""

import jax
import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine import model_runner
from infinite_llm.engine.engine import Engine
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.sampling_params import SamplingParams
from tests.testing import drain, write_shallow_checkpoint

BLOCK_SIZE = 8


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory):
  folder = write_shallow_checkpoint(tmp_path_factory.mktemp("model"))
  return load_hf(folder, make_mesh(1, 1), dtype="float32")


def uploads_of_decoding(model, monkeypatch, num_blocks):
  """Bytes of each upload in decode steps of one request that fills a pool."""
  engine = Engine(
    model,
    engine_config(
      block_size=BLOCK_SIZE,
      num_blocks=num_blocks,
      max_num_seqs=2,
      decode_buckets=(2,),
      prefill_buckets=(64,),
    ),
  )
  engine.add_request(
    [5] * ((num_blocks - 6) * BLOCK_SIZE),
    SamplingParams(max_tokens=4 * BLOCK_SIZE, ignore_eos=True),
  )
  while not engine.runner.launches["local_decode"]:
    engine.step()
  uploads = []
  place_rows = model_runner.place_rows

  def record(trees, mesh, rows):
    uploads.append(sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
    return place_rows(trees, mesh, rows)

  monkeypatch.setattr(model_runner, "place_rows", record)
  flushes = engine.runner.launches["write_entries"]
  drain(engine)
  flushes = engine.runner.launches["write_entries"] - flushes
  monkeypatch.undo()
  assert engine.runner.launches["local_decode"] > 3 * BLOCK_SIZE
  return uploads, flushes


def test_a_decode_step_uploads_as_much_however_long_its_request_is(
  model, monkeypatch
):
  short, short_flushes = uploads_of_decoding(model, monkeypatch, 16)
  long, long_flushes = uploads_of_decoding(model, monkeypatch, 256)

  assert short_flushes == long_flushes == 0
  assert set(short) == set(long)
  assert len(set(long)) == 1
  assert long[0] < 256


def test_entries_beyond_what_a_step_takes_are_written_first(model):
  engine = Engine(
    model,
    engine_config(
      block_size=BLOCK_SIZE,
      num_blocks=32,
      max_num_seqs=2,
      decode_buckets=(2,),
      prefill_buckets=(16,),
    ),
  )
  prompt, sampling = [5] * (20 * BLOCK_SIZE), SamplingParams(max_tokens=4)
  engine.add_request(prompt, sampling, request_id="alone")
  alone = drain(engine)["alone"].token_ids
  # A log that grows by two rBlocks a step and is moved when it has doubled.
  assert engine.runner.launches["write_entries"] > 0
  assert engine.num_unproved_rows == 0

  engine.add_request(prompt, sampling, request_id="again")
  assert drain(engine)["again"].token_ids == alone
