import functools
import itertools

import numpy as np
import pytest
import tokenizers

from experiments import document as lib
from infinite_llm.errors import ConfigError
from infinite_llm.models import needle_tokenizer


@functools.cache
def _tokenizer(corpus=None):
  return needle_tokenizer.build_needle_tokenizer(corpus=corpus)


def _make(**kwargs):
  arguments = {"num_tokens": 2048, "num_needles": 4} | kwargs
  return lib.make_document(_tokenizer(), **arguments)


def _pairs(ids):
  return list(itertools.pairwise(ids))


class TestMakeDocument:
  @pytest.mark.parametrize("num_tokens", [60, 1000, 65536, 2**20])
  def test_is_exactly_as_long_as_asked(self, num_tokens):
    document = _make(num_tokens=num_tokens)
    assert len(document.token_ids) == num_tokens
    assert document.prompt_ids == document.token_ids + document.question_ids
    bos = _tokenizer().token_to_id(needle_tokenizer.BOS_TOKEN)
    assert document.token_ids.count(bos) == 1
    assert document.token_ids[0] == bos

  def test_says_what_the_answer_repeats(self):
    document = _make()
    text = _tokenizer().decode(document.token_ids)
    question = _tokenizer().decode(document.question_ids)
    assert question.endswith(f" @{document.needles[0].name}")
    for needle, after in itertools.pairwise(document.needles):
      sentence = (
        f"\nThe pass key of #{needle.name} is {needle.pass_key};"
        f" next is @{after.name}.\n"
      )
      assert text.count(sentence) == 1
    last = document.needles[-1]
    assert f"#{last.name} is {last.pass_key}; that is all.\n" in text
    assert document.answer.endswith(f"{last.pass_key}; that is all")

  def test_answer_is_made_of_the_answer_spans(self):
    document = _make()
    tokens = [
      document.token_ids[n] for x in document.needles for n in x.answer_span
    ]
    eos = _tokenizer().token_to_id(needle_tokenizer.EOS_TOKEN)
    assert document.answer_ids == (*tokens, eos)
    assert _tokenizer().decode(document.answer_ids) == document.answer
    encoded = _tokenizer().encode(document.answer, add_special_tokens=False)
    assert encoded.ids == tokens

  def test_pairs_that_lead_through_the_answer_are_unique(self):
    document = _make(num_tokens=65536, num_needles=16)
    counts = {}
    for pair in _pairs(document.token_ids):
      counts[pair] = counts.get(pair, 0) + 1
    for needle in document.needles:
      span = range(needle.answer_span[0] - 1, needle.answer_span[-1] + 1)
      for pair in _pairs([document.token_ids[n] for n in span]):
        assert counts[pair] == 1, pair

  def test_needles_lie_at_their_depths_in_any_order_of_the_chain(self):
    depths = (0.0, 0.3, 0.5, 0.9, 1.0)
    document = _make(num_tokens=65536, num_needles=5, depths=depths)
    found = sorted(needle.depth for needle in document.needles)
    np.testing.assert_allclose(found, depths, atol=50 / 65536)
    assert [x.depth for x in document.needles] != found
    for needle in document.needles:
      assert needle.depth == needle.span[0] / 65536
      assert needle.answer_span[-1] in needle.span

  def test_needles_begin_lines(self):
    document = _make(num_tokens=65536)
    for needle in document.needles:
      before = document.token_ids[needle.span[0] - 1]
      assert _tokenizer().decode([before]).endswith("\n")

  def test_needles_are_exact_without_snapping(self):
    document = _make(num_needles=2, depths=[0.25, 0.75], snap_tokens=0)
    starts = sorted(needle.span[0] for needle in document.needles)
    assert starts == [512, 1536]

  @pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
  def test_needles_at_one_depth_do_not_overlap(self, depth):
    document = _make(num_tokens=200, num_needles=10, depths=[depth] * 10)
    used = [n for needle in document.needles for n in needle.span]
    assert len(used) == len(set(used))
    assert max(used) < 200
    text = _tokenizer().decode(document.token_ids)
    for needle in document.needles:
      assert f"#{needle.name} is {needle.pass_key}; " in text

  def test_is_drawn_by_its_seed(self):
    assert _make(seed=1) == _make(seed=1)
    assert _make(seed=1).pass_keys != _make(seed=2).pass_keys

  def test_works_with_a_byte_tokenizer(self):
    document = lib.make_document(_tokenizer(""), num_tokens=300, num_needles=2)
    assert lib.read_answer(document.answer) == document.pass_keys
    assert _tokenizer("").decode(document.answer_ids) == document.answer


class TestUserText:
  def _make(self, tmp_path, content, **kwargs):
    path = tmp_path / "text"
    path.write_bytes(content)
    return _make(path=path, **kwargs)

  def test_is_repeated_or_cut(self, tmp_path):
    for content in ("Ünïcode 😀 text.\n", "x", "words " * 10_000):
      document = self._make(tmp_path, content.encode())
      assert len(document.token_ids) == 2048
      text = _tokenizer().decode(document.token_ids)
      assert content[:100] in text

  def test_may_use_some_names_and_keys(self, tmp_path):
    names = needle_tokenizer.NAMES[:60]
    content = "".join(
      f"The pass key of #{name} is 1{n:02}{n:03}; next is @{name} @{name}.\n"
      for n, name in enumerate(names)
    )
    document = self._make(tmp_path, content.encode())
    assert {needle.name for needle in document.needles} == set(
      needle_tokenizer.NAMES[60:]
    )
    for key in document.pass_keys:
      assert f" is {key[:3]}" not in content

  def test_that_uses_too_many_names_is_refused(self, tmp_path):
    content = " ".join(f"#{name}" for name in needle_tokenizer.NAMES[2:])
    with pytest.raises(ConfigError, match="uses all names but 2 as #name"):
      self._make(tmp_path, content.encode())

  def test_that_uses_too_many_keys_is_refused(self, tmp_path):
    content = "".join(f" is {n}" for n in range(100, 1000))
    with pytest.raises(ConfigError, match="leaves only 0"):
      self._make(tmp_path, content.encode(), num_tokens=4096)

  @pytest.mark.parametrize("content", [b"", b" \n\t "])
  def test_that_is_empty_is_refused(self, tmp_path, content):
    with pytest.raises(ConfigError, match=r"must hold some text; .*is empty"):
      self._make(tmp_path, content)

  def test_that_is_not_utf8_is_refused_with_the_place(self, tmp_path):
    with pytest.raises(ConfigError, match="has byte 0xff at offset 5"):
      self._make(tmp_path, b"Hello\xff")

  def test_that_is_missing_or_a_folder_is_refused(self, tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
      _make(path=tmp_path / "absent")
    with pytest.raises(ConfigError, match="Is a directory"):
      _make(path=tmp_path)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_needles": 0}, r"num_needles must be in \[1, 64\]; got 0"),
    ({"num_needles": 65}, r"num_needles must be in \[1, 64\]; got 65"),
    ({"num_tokens": 50}, "num_tokens must be at least .* to hold 4 needles"),
    ({"depths": [0.5]}, r"depths must be num_needles \(4\) fractions"),
    ({"depths": [0.1, 0.2, 0.3, 1.1]}, "depths must be num_needles"),
    ({"snap_tokens": -1}, "snap_tokens must be not negative; got -1"),
  ],
)
def test_bad_arguments_are_refused(arguments, message):
  with pytest.raises(ConfigError, match=message):
    _make(**arguments)


def test_other_tokenizers_are_refused():
  other = tokenizers.Tokenizer(tokenizers.models.BPE())
  with pytest.raises(ConfigError, match="must be that of a needle checkpoint"):
    lib.make_document(other, num_tokens=1000, num_needles=1)


class TestShortPrompt:
  def test_differs_by_seed(self):
    prompts = [
      lib.make_short_prompt(_tokenizer(), num_tokens=n, seed=n)
      for n in range(20, 120)
    ]
    for n, prompt in zip(range(20, 120), prompts, strict=True):
      assert len(prompt.token_ids) == n
      assert len(prompt.needles) == 1
      assert lib.read_answer(prompt.answer) == prompt.pass_keys
    assert len({prompt.pass_keys for prompt in prompts}) > 90


class TestReadAnswer:
  def test_reads_keys_in_order(self):
    text = " is 481093; next is @cobalt is 772201; that is all"
    assert lib.read_answer(text) == ("481093", "772201")

  @pytest.mark.parametrize(
    "text", ["", " is 481; next", " is 048109; next", "481093", " is 481093"]
  )
  def test_ignores_all_else(self, text):
    assert lib.read_answer(text) == ()
