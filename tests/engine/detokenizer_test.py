"""Detokenisation with tokenizers that are made here, byte by byte."""

import itertools

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from infinite_llm.engine.detokenizer import Detokenizer

_WORDS = ("the", "Ġcat", "Ġsat", "ing")
_EOS = "<|end|>"
_EMOJI = "\N{GRINNING FACE}"
_FAMILY = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"


def _byte_level() -> tokenizers.Tokenizer:
  """Every byte is a token, some words too, and there is a special token."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: n for n, token in enumerate((*alphabet, *_WORDS))}
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=[], ignore_merges=True)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([_EOS])
  return tokenizer


def _sentencepiece() -> tokenizers.Tokenizer:
  """Decodes as Llama 2 does: byte tokens, and no space at the beginning."""
  pieces = ["▁cat", "▁sat", "s", *(f"<0x{n:02X}>" for n in range(256))]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: n for n, token in enumerate(pieces)},
      merges=[],
      byte_fallback=True,
    )
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return tokenizer


_BYTE_LEVEL = _byte_level()


def _bytes(tokenizer, text: bytes) -> list[int]:
  """One token per byte."""
  alphabet = _byte_alphabet()
  return [tokenizer.token_to_id(alphabet[byte]) for byte in text]


def _byte_alphabet() -> dict[int, str]:
  """How byte-level BPE writes each byte: printable ones as themselves."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return {
    byte: chr(byte if byte in printable else next(others))
    for byte in range(256)
  }


def _stream(tokenizer, ids, **options) -> list[str]:
  """All pieces; the last is what `finish` gives."""
  detokenizer = Detokenizer(tokenizer, **options)
  return [*map(detokenizer.append, ids), detokenizer.finish()]


class _CountingTokenizer:
  """A tokenizer that notes the most tokens it had to decode at once."""

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self.longest = 0

  def decode(self, token_ids, **options):
    self.longest = max(self.longest, len(token_ids))
    return self._tokenizer.decode(token_ids, **options)


class TestTokensWithoutText:
  @pytest.mark.parametrize("first", [b"", "é".encode()[:1]])
  def test_however_many_come_few_are_decoded_at_once(self, first):
    tokenizer = _CountingTokenizer(_BYTE_LEVEL)
    eos = _BYTE_LEVEL.token_to_id(_EOS)
    ids = [*_bytes(_BYTE_LEVEL, b"a" + first), *[eos] * 500]
    ids += [10**6] * 100  # Nor do ids that the tokenizer does not know.
    ids += _bytes(_BYTE_LEVEL, "é".encode()[len(first) :] + b"b")
    assert "".join(_stream(tokenizer, ids)) == "aéb"
    assert tokenizer.longest < 32


class TestCharacters:
  def test_plain_tokens_come_at_once(self):
    ids = [_BYTE_LEVEL.token_to_id(word) for word in ("the", "Ġcat", "Ġsat")]
    assert _stream(_BYTE_LEVEL, ids) == ["the", " cat", " sat", ""]

  def test_an_emoji_comes_with_its_last_token(self):
    ids = _bytes(_BYTE_LEVEL, f"a{_EMOJI}b".encode())
    assert _stream(_BYTE_LEVEL, ids) == ["a", "", "", "", _EMOJI, "b", ""]

  def test_a_sequence_of_emoji_comes_character_by_character(self):
    pieces = _stream(_BYTE_LEVEL, _bytes(_BYTE_LEVEL, _FAMILY.encode()))
    assert [piece for piece in pieces if piece] == list(_FAMILY)

  def test_half_a_character_at_the_end_is_flushed(self):
    ids = _bytes(_BYTE_LEVEL, b"a" + _EMOJI.encode()[:3])
    assert _stream(_BYTE_LEVEL, ids) == ["a", "", "", "", "\ufffd"]

  def test_broken_bytes_do_not_hold_text_for_ever(self):
    pieces = _stream(_BYTE_LEVEL, _bytes(_BYTE_LEVEL, b"\x80" * 40))
    assert "".join(pieces) == "\ufffd" * 40
    assert len("".join(pieces[:-1])) >= 30

  def test_a_character_after_broken_bytes_is_whole(self):
    broken = b"\xf0\x9f" * 9
    ids = _bytes(_BYTE_LEVEL, broken + _EMOJI.encode())
    text = "".join(_stream(_BYTE_LEVEL, ids))
    assert text == "\ufffd" * 9 + _EMOJI

  @hypothesis.given(st.text() | st.binary(max_size=60))
  def test_pieces_join_to_the_decoded_whole(self, text):
    raw = text if isinstance(text, bytes) else text.encode(errors="ignore")
    ids = _bytes(_BYTE_LEVEL, raw)
    pieces = _stream(_BYTE_LEVEL, ids)
    assert "".join(pieces) == _BYTE_LEVEL.decode(ids)
    if isinstance(text, str):
      assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)

  def test_bytes_of_sentencepiece_make_whole_characters(self):
    tokenizer = _sentencepiece()
    ids = [
      tokenizer.token_to_id(f"<0x{byte:02X}>")
      for byte in f"{_EMOJI}é{_EMOJI}".encode()
    ]
    pieces = _stream(tokenizer, ids)
    assert [piece for piece in pieces if piece] == [_EMOJI, "é", _EMOJI]

  def test_an_unknown_id_has_no_text(self):
    ids = [
      _BYTE_LEVEL.token_to_id("the"),
      10**6,
      _BYTE_LEVEL.token_to_id("ing"),
    ]
    assert _stream(_BYTE_LEVEL, ids) == ["the", "", "ing", ""]


class TestPrompt:
  def test_output_keeps_the_space_that_parts_it_from_the_prompt(self):
    tokenizer = _sentencepiece()
    cat, sat = tokenizer.token_to_id("▁cat"), tokenizer.token_to_id("▁sat")
    assert _stream(tokenizer, [sat, sat]) == ["sat", " sat", ""]
    continued = _stream(tokenizer, [sat, sat], prompt_token_ids=[cat, cat])
    assert continued == [" sat", " sat", ""]

  def test_output_keeps_its_spaces_behind_tokens_without_text(self):
    tokenizer = _sentencepiece()
    sat = tokenizer.token_to_id("▁sat")
    assert _stream(tokenizer, [sat, 10**6, sat]) == ["sat", "", " sat", ""]

  def test_prompt_may_end_with_half_a_character(self):
    prompt = _bytes(_BYTE_LEVEL, b"a" + _EMOJI.encode()[:2])
    ids = _bytes(_BYTE_LEVEL, _EMOJI.encode()[2:] + b"b")
    pieces = _stream(_BYTE_LEVEL, ids, prompt_token_ids=prompt)
    assert pieces == ["", _EMOJI, "b", ""]

  def test_prompt_text_is_no_output(self):
    prompt = _bytes(_BYTE_LEVEL, f"stop {_EMOJI}".encode())
    pieces = _stream(
      _BYTE_LEVEL,
      _bytes(_BYTE_LEVEL, b"!"),
      prompt_token_ids=prompt,
      stop=(f"{_EMOJI}!",),
    )
    assert pieces == ["!", ""]


class TestSpecialTokens:
  @pytest.mark.parametrize("skip", [True, False])
  def test_are_left_out_if_asked(self, skip):
    ids = [_BYTE_LEVEL.token_to_id(token) for token in ("the", _EOS, "ing")]
    pieces = _stream(_BYTE_LEVEL, ids, skip_special_tokens=skip)
    assert pieces == ["the", "" if skip else _EOS, "ing", ""]

  def test_do_not_part_a_character(self):
    ids = _bytes(_BYTE_LEVEL, _EMOJI.encode())
    ids[2:2] = [_BYTE_LEVEL.token_to_id(_EOS)] * 12
    assert "".join(_stream(_BYTE_LEVEL, ids)) == _EMOJI


class TestStopStrings:
  def test_text_ends_before_a_stop_string_over_tokens(self):
    ids = _bytes(_BYTE_LEVEL, b"one STOP two")
    detokenizer = Detokenizer(_BYTE_LEVEL, stop=("STOP",))
    pieces = [detokenizer.append(token_id) for token_id in ids]
    assert "".join(pieces) == "one "
    assert detokenizer.is_stopped
    assert detokenizer.finish() == ""

  def test_a_possible_beginning_is_held_back_and_released(self):
    pieces = _stream(_BYTE_LEVEL, _bytes(_BYTE_LEVEL, b"aSTSx"), stop=("STOP",))
    assert pieces == ["a", "", "", "ST", "Sx", ""]

  def test_a_beginning_at_the_end_is_flushed(self):
    detokenizer = Detokenizer(_BYTE_LEVEL, stop=("STOP",))
    pieces = [detokenizer.append(n) for n in _bytes(_BYTE_LEVEL, b"xSTO")]
    assert pieces == ["x", "", "", ""]
    assert detokenizer.finish() == "STO"
    assert not detokenizer.is_stopped

  def test_what_follows_in_the_same_token_is_dropped(self):
    ids = [_BYTE_LEVEL.token_to_id("Ġsat"), _BYTE_LEVEL.token_to_id("the")]
    assert _stream(_BYTE_LEVEL, ids, stop=("s",)) == [" ", "", ""]

  def test_a_self_overlapping_stop_string_is_found(self):
    pieces = _stream(_BYTE_LEVEL, _bytes(_BYTE_LEVEL, b"xaaab"), stop=("aab",))
    assert "".join(pieces) == "xa"

  def test_an_emoji_can_stop(self):
    ids = _bytes(_BYTE_LEVEL, f"no {_EMOJI} more".encode())
    assert "".join(_stream(_BYTE_LEVEL, ids, stop=(_EMOJI,))) == "no "

  def test_the_stop_string_can_be_part_of_the_text(self):
    ids = _bytes(_BYTE_LEVEL, b"a STOP b")
    pieces = _stream(_BYTE_LEVEL, ids, stop=("STOP",), include_stop=True)
    assert "".join(pieces) == "a STOP"

  def test_the_stop_string_that_is_complete_first_counts(self):
    ids = _bytes(_BYTE_LEVEL, b"abcdef")
    pieces = _stream(_BYTE_LEVEL, ids, stop=("bcdef", "cd"))
    assert "".join(pieces) == "ab"

  def test_of_those_complete_together_the_longest_counts(self):
    ids = _bytes(_BYTE_LEVEL, b"abcdef")
    pieces = _stream(_BYTE_LEVEL, ids, stop=("cd", "bcd"))
    assert "".join(pieces) == "a"

  @hypothesis.given(
    st.text("ab\u00e9", max_size=24),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3),
  )
  def test_text_is_that_of_a_search_in_the_whole(self, text, stop):
    matches = [
      (end, end - len(each))
      for each, end in itertools.product(stop, range(len(text) + 1))
      if text[:end].endswith(each)
    ]
    whole = text[: min(matches)[1]] if matches else text
    ids = _bytes(_BYTE_LEVEL, text.encode())
    assert "".join(_stream(_BYTE_LEVEL, ids, stop=stop)) == whole
