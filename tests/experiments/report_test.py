"""Tables and the report of a run, from made-up results."""

import pytest

from experiments.report import serving_report, table

_RESULT = {
  "context_tokens": 3000,
  "capacity_tokens_per_instance": 2000,
  "num_instances": 2,
  "block_size": 16,
  "blocks_per_instance": 125,
  "creditors": [1],
  "blocks_lent_by_to": [[0, 0], [70, 0]],
  "instances": [
    {
      "requests": 1,
      "prompt_tokens": 3000,
      "output_tokens": 20,
      "peak_own": 120,
      "peak_hosted": 0,
    },
    {
      "requests": 4,
      "prompt_tokens": 400,
      "output_tokens": 40,
      "peak_own": 9,
      "peak_hosted": 70,
    },
  ],
  "prefill_tokens_per_s": 1500.0,
  "decode_tokens_per_s": None,
  "warm_up_s": 9.0,
  "serve_s": 4.0,
  "expected": ["123456", "654321"],
  "answer": ["123456", "654321"],
  "correct": True,
  "num_short_requests": 4,
  "short_requests_right": 4,
  "error": None,
  "blocks_leaked": 0,
}


def test_a_table_aligns_names_left_and_numbers_right():
  text = table("Title", ["", "n"], [["a", 1234], ["long", 1.25], ["c", None]])
  assert text.split("\n") == [
    "Title",
    "          n",
    "----  -----",
    "a     1,234",
    "long    1.2",
    "c         -",
  ]


def test_the_report_says_who_lent_what():
  lines = serving_report(_RESULT).split("\n")
  assert "instance 1          70           -" in lines
  assert "instance 0           -           -" in lines


def test_the_report_gives_tokens_per_second_of_each_instance():
  lines = serving_report(_RESULT).split("\n")
  rows = [line.split() for line in lines if line.startswith("instance 1")]
  assert "110.0" in rows[1]


def test_the_report_says_what_was_right():
  text = serving_report(_RESULT)
  assert "3,000 tokens, 1.5 times what an instance holds" in text
  assert "Answered  123456, 654321: right." in text
  assert "4 of 4 right" in text
  assert "given back" not in text


@pytest.mark.parametrize(
  ("change", "line"),
  [
    ({"answer": [], "correct": False}, "Answered  nothing: WRONG."),
    ({"error": "too large"}, "ended for an error: too large"),
    ({"blocks_leaked": 3}, "3 rBlocks were not given back."),
  ],
)
def test_the_report_says_what_went_wrong(change, line):
  assert line in serving_report(_RESULT | change)
