import functools
import re

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from infinite_llm.models import needle_tokenizer as lib


@functools.cache
def _build(corpus=None):
  return lib.build_needle_tokenizer(corpus=corpus)


def _encode(tokenizer, text):
  return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("corpus", [None, ""])
@hypothesis.given(text=st.text(max_size=40))
@hypothesis.example(
  text="naïve 😀👩‍👩‍👧 \u202e\r\n\t x\x00 '#amber' @cobalt; next is"
)
def test_any_text_comes_back_unchanged(corpus, text):
  tokenizer = _build(corpus)
  ids = _encode(tokenizer, text)
  assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_default_corpus_comes_back_unchanged_in_few_tokens():
  text = lib.default_corpus()
  ids = _encode(_build(), text)
  assert _build().decode(ids) == text
  assert len(ids) < len(text) / 3


@pytest.mark.parametrize("corpus", [None, ""])
def test_answers_are_made_of_single_tokens(corpus):
  tokenizer = _build(corpus)
  ids = _encode(tokenizer, " is 481093; next is @cobalt is 100000; that is all")
  assert [tokenizer.decode([n]) for n in ids] == [
    " is", " 481", "093", "; next is", " @cobalt",
    " is", " 100", "000", "; that is all",
  ]  # fmt: skip
  for n in range(1000):
    assert len(_encode(tokenizer, f"{n:03}")) == 1
  for name in lib.NAMES:
    for text in (f"#{name}", f"@{name}", f" @{name}"):
      assert len(_encode(tokenizer, text)) == 1


def test_markers_are_found_inside_text():
  tokens = _build().encode("(#amber,@teak) see @teak.").tokens
  assert "#amber" in tokens
  assert "@teak" in tokens
  assert " @teak" in tokens


def test_text_begins_with_its_own_token():
  ids = _build().encode("Hello").ids
  assert ids[0] == _build().token_to_id(lib.BOS_TOKEN)
  assert _build().decode(ids) == "Hello"


def test_no_name_begins_another():
  assert len(set(lib.NAMES)) == len(lib.NAMES) == 64
  for name in lib.NAMES:
    assert re.fullmatch("[a-z]+", name)
    assert [n for n in lib.NAMES if n.startswith(name)] == [name]


def test_is_deterministic_and_survives_saving():
  again = lib.build_needle_tokenizer()
  assert again.to_str() == _build().to_str()
  loaded = tokenizers.Tokenizer.from_str(again.to_str())
  text = "The pass key of #amber is 481093; that is all."
  assert loaded.encode(text).ids == again.encode(text).ids


def test_fills_the_vocabulary_that_it_is_given():
  for size in (2500, 4096):
    built = lib.build_needle_tokenizer(vocab_size=size).get_vocab_size()
    assert size - 4 <= built <= size  # The corpus may teach needle tokens.


def test_refuses_a_vocabulary_without_room_for_needles():
  with pytest.raises(ValueError, match=r"vocab_size must be at least \d+;"):
    lib.build_needle_tokenizer(vocab_size=300, corpus="")
