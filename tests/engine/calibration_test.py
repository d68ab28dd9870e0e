"""Scales found from prompts make their largest keys and values 448."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.calibration import calibrate_kv_scales
from infinite_llm.errors import ModelError, RequestError
from infinite_llm.models.hf_loader import load_hf
from tests.testing import GOLDEN, dense_attend, write_shallow_checkpoint


def prompts_of(*lengths):
  rng = np.random.default_rng(1)
  return [rng.integers(3, 256, length).tolist() for length in lengths]


def largest_of(model, prompts) -> np.ndarray:
  """`[L, 2, K]` largest keys and values, by a dense model."""

  @jax.jit
  def largest(tokens):
    found = []
    positions = jnp.arange(len(tokens))
    dense = dense_attend(model.config, positions)

    def attend(layer, q, k, v, cache):
      assert layer == len(found)
      found.append([jnp.abs(x).max(axis=(0, 2)) for x in (k, v)])
      return dense(layer, q, k, v, cache)

    model.dense()(tokens, positions, None, attend)
    return jnp.array(found)

  return np.max([largest(jnp.asarray(prompt)) for prompt in prompts], axis=0)


@pytest.mark.parametrize(
  ("family", "num_kv_heads", "mesh", "lengths"),
  [
    ("llama3", None, (1, 1), (1, 300, 64)),  # In buckets of 256 and 512.
    ("qwen2_window", None, (2, 1), (200,)),
    ("qwen3", None, (1, 2), (64, 65)),
    ("llama2", 1, (2, 2), (100,)),
  ],
)
def test_the_largest_number_of_each_head_becomes_448(
  tmp_path, family, num_kv_heads, mesh, lengths
):
  folder = write_shallow_checkpoint(tmp_path, family, 2, num_kv_heads)
  model = load_hf(folder, make_mesh(*mesh), dtype="float32")
  prompts = prompts_of(*lengths)
  scales = calibrate_kv_scales(model, prompts)
  assert scales.dtype == np.float32
  whole = load_hf(folder, make_mesh(1, 1), dtype="float32")
  expected = largest_of(whole, prompts) / 448
  np.testing.assert_allclose(scales, expected, rtol=1e-5)
  assert len(np.unique(scales)) == scales.size


def changed_model(tmp_path, change):
  """A model of one layer with another value projection."""
  folder = write_shallow_checkpoint(tmp_path)
  model = load_hf(folder, make_mesh(1, 1), dtype="float32")
  weight = model.state["layers"][0]["self_attn"]["v_proj"]
  weight["weight"] = change(weight["weight"])
  return model


def test_a_head_of_zeros_has_scale_one(tmp_path):
  model = changed_model(tmp_path, lambda weight: weight.at[:16].set(0.0))
  scales = calibrate_kv_scales(model, prompts_of(20))
  assert scales[0, 1, 0] == 1
  assert (scales[0, 0] < 1).all()
  assert scales[0, 1, 1] < 1


def test_values_that_are_no_numbers_are_an_error(tmp_path):
  model = changed_model(tmp_path, lambda weight: weight.at[0, 0].set(jnp.nan))
  with pytest.raises(ModelError, match="key or value of layer 0 is not finite"):
    calibrate_kv_scales(model, prompts_of(20))


def test_texts_are_taken_as_the_tokenizer_has_them():
  model = load_hf(GOLDEN / "llama3", make_mesh(1, 1), dtype="float32")
  text = "Scales of keys and values."
  tokens = model.tokenizer.encode(text).ids
  np.testing.assert_array_equal(
    *(calibrate_kv_scales(model, [prompt]) for prompt in (text, tokens))
  )


@pytest.mark.parametrize(
  ("prompts", "message"),
  [
    ([], "prompts must have at least one prompt; got none"),
    ([[]], "prompts must each have at least one token; got none"),
    ([[3, 10**6]], r"prompt token ids must be in \[0, \d+\); got 1000000"),
    ([[-1]], r"prompt token ids must be in \[0, \d+\); got -1"),
    ([[0.5]], r"prompt token ids must be integers; got 0\.5"),
  ],
)
def test_prompts_that_mean_nothing_are_refused(prompts, message):
  model = load_hf(GOLDEN / "llama3", make_mesh(1, 1), dtype="float32")
  with pytest.raises(RequestError, match=message):
    calibrate_kv_scales(model, prompts)
