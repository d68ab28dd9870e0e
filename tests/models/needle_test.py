import functools
import hashlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import document as document_lib
from infinite_llm.distributed import mesh as mesh_lib
from infinite_llm.models import hf_loader, needle, rope
from tests import testing

MILLION = 2**20
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return needle.build_needle_checkpoint(tmp_path_factory.mktemp("needle") / "m")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("needle") / "tiny"
  return needle.build_needle_checkpoint(path, corpus="", vocab_size=2400)


@pytest.fixture(scope="module")
def load(folder):
  mesh = mesh_lib.make_mesh(1, 1)
  return functools.cache(
    lambda dtype: hf_loader.load_hf(folder, mesh, dtype=dtype)
  )


@pytest.fixture(scope="module")
def read(load):
  return functools.cache(lambda dtype: Reader(load(dtype)))


class Reader:
  """Computes a prompt's KV once, then answers from any part of it."""

  def __init__(self, loaded):
    self._model = loaded.dense()
    self.prefill = jax.jit(self._prefill)
    self._decode = jax.jit(self._answer_logits)

  def _prefill(self, tokens, positions):
    """Returns k and v, `[L, T, K, D]` each, in the model's dtype."""
    kept = []
    dense = testing.dense_attend(self._model.config, positions)

    def attend(layer, q, k, v, cache):
      kept.append((k, v))
      out, cache = dense(layer, q, k, v, cache)
      return out.astype(q.dtype), cache

    self._model(tokens, positions, None, attend)
    return tuple(jnp.stack(part) for part in zip(*kept, strict=True))

  def _answer_logits(self, kv, present, tokens, positions):
    """Decodes all `tokens` at once; `present [T]` says which KV is there."""

    def attend(layer, q, k, v, cache):
      keys = jnp.concatenate([kv[0][layer], k]).astype(jnp.float32)[:, 0]
      values = jnp.concatenate([kv[1][layer], v]).astype(jnp.float32)[:, 0]
      causal = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
      old = jnp.broadcast_to(present, (len(tokens), len(present)))
      visible = jnp.concatenate([old, causal], axis=1)
      scores = jnp.einsum("qhd,kd->hqk", q.astype(jnp.float32), keys) / 8
      weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
      out = jnp.einsum("hqk,kd->qhd", weights, values)
      return out.astype(q.dtype), cache

    hidden, _ = self._model(tokens, positions, None, attend)
    return self._model.logits(hidden)

  def answer(self, document, *, kv=None, present=None, first=0, jump=0):
    """Returns the logits `[answer, V]` after each right beginning.

    Args:
      document: Gives prompt and answer.
      kv: KV of the prompt but for its last token; None computes it.
      present: `[prompt - 1]` bool; None is all.
      first: Position of the first token.
      jump: Positions left out between document and question.
    """
    prompt = np.array(document.prompt_ids)
    positions = first + np.arange(len(prompt) + len(document.answer_ids) - 1)
    positions[len(document.token_ids) :] += jump
    old = len(prompt) - 1
    if kv is None:
      kv = self.prefill(prompt[:old], positions[:old])
    if present is None:
      present = np.ones(old, bool)
    tokens = np.array([prompt[-1], *document.answer_ids[:-1]])
    return np.array(self._decode(kv, present, tokens, positions[old:]))


def _gap(logits):
  best = np.sort(logits, axis=-1)
  return (best[:, -1] - best[:, -2]).min()


class TestAnswer:
  @DTYPES
  def test_is_right_at_millions_of_tokens(self, load, read, dtype):
    loaded = load(dtype)
    document = document_lib.make_document(
      loaded.tokenizer, num_tokens=400, num_needles=4
    )
    reader = read(dtype)
    for first in (0, MILLION, 2 * MILLION, 4 * MILLION):
      for jump in (0, MILLION, 4 * MILLION):
        logits = reader.answer(document, first=first, jump=jump)
        assert tuple(logits.argmax(-1)) == document.answer_ids, (first, jump)
        assert _gap(logits) > 30, (first, jump)

  def test_is_right_where_it_is_generated_token_by_token(self, load):
    loaded = load("float32")
    document = document_lib.make_short_prompt(loaded.tokenizer, num_tokens=200)
    generated = testing.dense_greedy(
      loaded.dense(), document.prompt_ids, len(document.answer_ids)
    )
    assert tuple(generated) == document.answer_ids
    text = loaded.tokenizer.decode(generated)
    assert text == document.answer
    assert document_lib.read_answer(text) == document.pass_keys

  def test_works_with_the_byte_tokenizer(self, tiny_folder):
    mesh = mesh_lib.make_mesh(1, 1)
    loaded = hf_loader.load_hf(tiny_folder, mesh, dtype="float32")
    document = document_lib.make_document(
      loaded.tokenizer, num_tokens=500, num_needles=5
    )
    logits = Reader(loaded).answer(document)
    assert tuple(logits.argmax(-1)) == document.answer_ids

  def test_continues_text_that_it_has_seen(self, load):
    loaded = load("float32")
    tokenizer = loaded.tokenizer
    sentence = "The quick brown fox jumps over the lazy dog."
    prompt = tokenizer.encode(f"{sentence} Other words. The quick").ids
    generated = testing.dense_greedy(loaded.dense(), prompt, 8)
    assert sentence[len("The quick") :].startswith(tokenizer.decode(generated))


class TestEveryBlock:
  """A chain of 64 needles, one in each of 64 rBlocks, visited in any order."""

  def _make(self, loaded, block_size, seed):
    count = 64
    length = count * block_size
    # Needles are 13 tokens long, and stand anywhere in their rBlocks.
    starts = [
      max(1, n * block_size + n % (block_size - 12)) for n in range(count)
    ]
    document = document_lib.make_document(
      loaded.tokenizer,
      num_tokens=length,
      num_needles=count,
      depths=[start / length for start in starts],
      snap_tokens=0,
      seed=seed,
    )
    blocks = [
      {n // block_size for n in needle.span} for needle in document.needles
    ]
    assert sorted(blocks, key=min) == [{n} for n in range(count)]
    return document, [min(block) for block in blocks]

  @pytest.mark.parametrize("block_size", [16, 64])
  def test_is_needed(self, load, read, block_size):
    loaded = load("float32")
    reader = read("float32")
    document, blocks = self._make(loaded, block_size, seed=1)
    prompt = np.array(document.prompt_ids)[:-1]
    right = np.array(document.answer_ids)
    kv = reader.prefill(prompt, np.arange(len(prompt)))
    found = reader.answer(document, kv=kv).argmax(-1)
    np.testing.assert_array_equal(found, right)

    for n, block in enumerate(blocks):
      present = np.arange(len(prompt)) // block_size != block
      found = reader.answer(document, kv=kv, present=present).argmax(-1)
      told = np.arange(len(right)) // 5 == n  # Five answer tokens a needle.
      pass_key = slice(5 * n + 1, 5 * n + 3)
      assert (found[pass_key] != right[pass_key]).any(), block
      np.testing.assert_array_equal(found[~told], right[~told])

  def test_must_not_be_stale(self, load, read):
    block_size = 16
    loaded = load("float32")
    reader = read("float32")
    document, blocks = self._make(loaded, block_size, seed=1)
    other, _ = self._make(loaded, block_size, seed=2)
    prompt = np.array(document.prompt_ids)[:-1]
    right = np.array(document.answer_ids)
    kv = reader.prefill(prompt, np.arange(len(prompt)))
    stale = reader.prefill(
      np.array(other.prompt_ids)[:-1], np.arange(len(prompt))
    )
    for n, block in enumerate(blocks):
      of_block = slice(block * block_size, (block + 1) * block_size)
      mixed = tuple(
        fresh.at[:, of_block].set(old[:, of_block])
        for fresh, old in zip(kv, stale, strict=True)
      )
      found = reader.answer(document, kv=mixed).argmax(-1)
      told = np.arange(len(right)) // 5 == n
      assert (found[told] != right[told]).any(), block


def test_a_needle_across_two_blocks_needs_both(load, read):
  loaded = load("float32")
  document = document_lib.make_document(
    loaded.tokenizer,
    num_tokens=128,
    num_needles=1,
    depths=[55 / 128],
    snap_tokens=0,
  )
  (hidden,) = document.needles
  assert hidden.answer_span[0] < 64 < hidden.answer_span[-1]
  reader = read("float32")
  size = len(document.prompt_ids) - 1
  for block in range(2):
    present = np.arange(size) // 64 != block
    logits = reader.answer(document, present=present)
    assert tuple(logits.argmax(-1)) != document.answer_ids


class TestMargins:
  """The table in the module's docstring."""

  @staticmethod
  @functools.partial(jax.jit, static_argnames="dtype")
  def _rotate(x, positions, dtype):
    """Rotates `[T, 64]` as the model does; float32 values of that dtype."""
    radians = rope.frequencies(rope.RopeConfig(theta=needle.ROPE_THETA), 64)
    cos, sin = rope.rotation(positions, radians)
    rotated = rope.rotate(x[:, None].astype(dtype), cos, sin)
    return rotated[:, 0].astype(jnp.float32)

  @pytest.mark.parametrize(
    ("dtype", "least"), [("float32", 52), ("bfloat16", 50)]
  )
  def test_layer_0_tells_one_distance_from_four_million(
    self, folder, dtype, least
  ):
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    x = weights["model.embed_tokens.weight"][300]
    x = x / np.sqrt(np.mean(x**2))
    q = weights["model.layers.0.self_attn.q_proj.weight"] @ x
    k = weights["model.layers.0.self_attn.k_proj.weight"] @ x
    last, chunk = 4 * MILLION, MILLION // 2
    queries = q.reshape(2, 64)
    queries = self._rotate(queries, jnp.array([last - 1, last - 1]), dtype)

    @jax.jit
    def score(start):
      keys = jnp.broadcast_to(k, (chunk, 64))
      keys = self._rotate(keys, start + jnp.arange(chunk), dtype)
      return keys @ queries.T / 8

    scores = [np.array(score(start)) for start in range(0, last, chunk)]
    scores = np.concatenate(scores)
    for head in range(2):
      right = last - 2 - head  # The query's position, less head + 1.
      others = np.delete(scores[:, head], right)
      assert scores[right, head] - others.max() > least

  @DTYPES
  def test_layer_1_compares_codes_exactly(self, load, dtype):
    loaded = load(dtype)
    seen = {}
    tokens = jnp.array([300, 301, 302, 303])
    positions = jnp.arange(4)
    dense = testing.dense_attend(loaded.config, positions)

    def attend(layer, q, k, v, cache):
      seen[layer] = (q, k)
      out, cache = dense(layer, q, k, v, cache)
      return out.astype(q.dtype), cache

    loaded.dense()(tokens, positions, None, attend)
    q, k = (np.array(x.astype(jnp.float32)) for x in seen[1])
    codes = needle.token_codes(304)
    tolerance = {"rtol": 2e-6, "atol": 2e-4}
    first, second = slice(8, 32), slice(40, 64)
    np.testing.assert_allclose(q[3, 0, first], 128 * codes[303], **tolerance)
    np.testing.assert_allclose(q[3, 0, second], 32 * codes[302], **tolerance)
    np.testing.assert_allclose(k[3, 0, first], codes[302], **tolerance)
    np.testing.assert_allclose(k[3, 0, second], codes[301], **tolerance)

  @DTYPES
  def test_layer_1_finds_one_pair_among_four_million_near_misses(self, dtype):
    # Every other key has the right last token, and before it one whose code is
    # as close to the right one as codes get.
    last = 4 * MILLION
    chunk = MILLION // 2
    codes = needle.token_codes(4096)
    products = codes @ codes.T
    token, before = 17, 2345
    close = np.flatnonzero(products[before] == 16)
    zeros = np.zeros(8)
    query = np.concatenate(
      [zeros, 128 * codes[token], zeros, 32 * codes[before]]
    )
    query = self._rotate(query[None], jnp.array([last]), dtype)[0]
    pad = np.zeros((len(close), 8))
    wrong = np.concatenate(
      [pad, np.tile(codes[token], (len(close), 1)), pad, codes[close]], axis=1
    )

    @jax.jit
    def weigh(start):
      positions = start + jnp.arange(chunk)
      keys = jnp.asarray(wrong)[positions % len(close)]
      keys = self._rotate(keys, positions, dtype)
      return jax.nn.logsumexp(keys @ query / 8)

    others = [weigh(start) for start in range(0, last, chunk)]
    others = jax.nn.logsumexp(jnp.array(others))
    right = np.concatenate([zeros, codes[token], zeros, codes[before]])
    for position in (0, MILLION, 2 * MILLION, last - 1):
      key = self._rotate(right[None], jnp.array([position]), dtype)[0]
      assert key @ query / 8 - others > 40, position


class TestCodes:
  def test_are_shortest_vectors_of_the_leech_lattice(self):
    codes = needle.token_codes(3 * 2048)
    products = codes @ codes.T
    np.testing.assert_array_equal(np.diag(products), 32)
    others = products[~np.eye(len(codes), dtype=bool)]
    assert set(np.unique(others)) == {-16, -8, 0, 8, 16}

  @pytest.mark.parametrize("vocab_size", [0, 49153])
  def test_refuse_more_than_there_are(self, vocab_size):
    with pytest.raises(ValueError, match="in \\[1, 49152\\]"):
      needle.token_codes(vocab_size)


def _digests(folder: pathlib.Path):
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in folder.iterdir()
  }


class TestBuild:
  def test_gives_the_same_bytes_in_another_process(self, folder, tmp_path):
    script = (
      "import sys; from infinite_llm.models import needle;"
      "needle.build_needle_checkpoint(sys.argv[1])"
    )
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", script, again], check=True)
    assert _digests(again) == _digests(folder)

  def test_leaves_a_complete_folder_alone(self, tiny_folder):
    before = (tiny_folder / "config.json").stat().st_mtime_ns
    needle.build_needle_checkpoint(tiny_folder, corpus="", vocab_size=2400)
    assert (tiny_folder / "config.json").stat().st_mtime_ns == before

  def test_replaces_an_earlier_or_incomplete_checkpoint(self, tmp_path):
    path = tmp_path / "m"
    build = functools.partial(needle.build_needle_checkpoint, path, corpus="")
    build()
    first = _digests(path)
    (path / "tokenizer.json").unlink()
    build()
    assert _digests(path) == first
    build(dtype="bfloat16")
    assert _digests(path) != first
    assert list(tmp_path.iterdir()) == [path]

  def test_its_vocabulary_splits_over_devices(self, tmp_path):
    path = needle.build_needle_checkpoint(tmp_path / "m", corpus="")
    config = json.loads((path / "config.json").read_text())
    assert config["vocab_size"] % 64 == 0

  def test_refuses_a_folder_of_something_else(self, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="path must be empty or hold"):
      needle.build_needle_checkpoint(tmp_path, corpus="")
    assert (tmp_path / "notes.txt").read_text() == "mine"

  @pytest.mark.parametrize(
    ("arguments", "message"),
    [
      ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
      ({"vocab_size": 1000}, "vocab_size must be at least .*; got 1000"),
    ],
  )
  def test_refuses_bad_arguments(self, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
      needle.build_needle_checkpoint(tmp_path / "m", corpus="", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_transformers_gives_the_same_logits(folder, load):
  loaded = load("float32")
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  document = document_lib.make_document(
    loaded.tokenizer, num_tokens=512, num_needles=4
  )
  tokens = [*document.prompt_ids, *document.answer_ids[:-1]]
  oracle = transformers.AutoModelForCausalLM.from_pretrained(folder)
  with torch.no_grad():
    expected = oracle(torch.tensor([tokens])).logits[0].numpy()
  found = testing.dense_logits(loaded.dense(), tokens)
  rows = slice(-len(document.answer_ids), None)
  np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-4, atol=1e-4)
  assert tuple(expected[rows].argmax(-1)) == document.answer_ids
