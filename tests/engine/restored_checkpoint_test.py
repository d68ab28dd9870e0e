"""A model saved with Orbax serves like the folder that it came from."""

from infinite_llm import LLM, SamplingParams
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.models import checkpoint
from infinite_llm.models.hf_loader import load_hf
from tests.testing import GOLDEN


def answer(path) -> tuple[int, ...]:
  llm = LLM(
    path,
    block_size=16,
    num_blocks=8,
    max_num_seqs=1,
    decode_buckets=(1,),
    prefill_buckets=(32,),
    prefill_rows=1,
    show_progress=False,
  )
  (output,) = llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=8))
  return output.token_ids


def test_a_saved_model_can_be_served(tmp_path):
  model = load_hf(GOLDEN / "llama2", make_mesh(1, 1), dtype="float32")
  saved = tmp_path / "saved"
  checkpoint.save(
    saved,
    model.config,
    model.state,
    tokenizer=model.tokenizer,
    generation=model.generation,
  )
  assert answer(saved) == answer(GOLDEN / "llama2")
