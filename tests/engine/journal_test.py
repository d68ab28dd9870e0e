"""What a journal knows after a crash, wherever it came."""

import dataclasses
import json

import pytest

from infinite_llm.engine.journal import Accepted, Ended, Journal
from infinite_llm.engine.outputs import Extent, OutputRecord, RequestOutput
from infinite_llm.errors import ConfigError, RequestError
from infinite_llm.sampling_params import SamplingParams

_HEADER = '{"journal": 2, "settings": {}}'


def request(name, **options):
  return Accepted(
    request_id=name,
    prompt_token_ids=(1, 2, 3),
    sampling=SamplingParams(**options),
  )


def output(name, reason="stop", error=None):
  record = OutputRecord(token_ids=[4, 5], pieces=["a", "\u2603"], logprobs=None)
  return RequestOutput(
    uid=1,
    request_id=name,
    prompt_token_ids=(1, 2, 3),
    finish_reason=reason,
    error=error,
    instance=0,
    record=record,
    extent=record.extent,
    seen=Extent(),
  )


@pytest.fixture
def path(tmp_path):
  return tmp_path / "journal.jsonl"


def test_what_did_not_end_is_owed_an_answer(path):
  first = request("first", stop=("x",), max_tokens=7)
  second = request("second", temperature=0.7, seed=11)
  with Journal(path) as journal:
    assert journal.unfinished == []
    for each in (first, second, request("third")):
      journal.accept(each)
    journal.end(output("second"))
  with Journal(path) as journal:
    assert journal.unfinished == [first, request("third")]
    assert list(journal.accepted.values())[1] == second
    assert journal.ended == {
      "second": Ended(
        request_id="second",
        token_ids=(4, 5),
        text="a\u2603",
        finish_reason="stop",
        error=None,
      )
    }
    journal.end(output("third", "error", RuntimeError("why")))
  with Journal(path) as journal:
    assert journal.unfinished == [first]
    assert journal.ended["third"].error == "why"


def test_every_place_that_a_crash_can_cut_it_at(path):
  with Journal(path) as journal:
    journal.accept(request("first"))
    journal.accept(request("second"))
    journal.end(output("first"))
  whole = path.read_bytes()
  ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
  for size in range(len(whole) + 1):
    path.write_bytes(whole[:size])
    num_lines = sum(end <= size for end in ends)
    with Journal(path) as journal:
      assert len(journal.accepted) == min(max(num_lines - 1, 0), 2)
      assert len(journal.ended) == (num_lines == 4)
      journal.accept(request("later"))
    with Journal(path) as journal:
      assert "later" in journal.accepted


def test_what_it_cannot_promise_is_refused(path):
  with Journal(path) as journal:
    journal.accept(request("first"))
    with pytest.raises(RequestError, match=r"must be unique .* 'first' again"):
      journal.accept(request("first"))
    with pytest.raises(RequestError, match=r"seed must be set .* 'hot' has"):
      journal.accept(request("hot", temperature=1.0))
    for wrong in (output("nobody"), output("first", None)):
      with pytest.raises(RequestError, match=r"must be the last one"):
        journal.end(wrong)
    journal.end(output("first"))
    with pytest.raises(RequestError, match=r"must be the last one"):
      journal.end(output("first"))


@pytest.mark.parametrize(
  ("lines", "number"),
  [
    (['{"journal": 1}'], 1),
    (['{"journal": 3, "settings": {}}'], 1),
    (["no json"], 1),
    (['{"journal": 2, "settings": []}'], 1),
    (['{"journal": 2, "settings": null}'], 1),
    ([_HEADER, '{"accepted": {}}'], 2),
    ([_HEADER, '{"other": 1}'], 2),
  ],
)
def test_another_file_is_refused_and_left_as_it_is(path, lines, number):
  text = "".join(line + "\n" for line in lines)
  path.write_text(text)
  with pytest.raises(ConfigError, match=rf"version 2; line {number} is not"):
    Journal(path)
  assert path.read_text() == text


@pytest.mark.parametrize(
  ("later", "message"),
  [
    ({"dtype": "b", "model": "x"}, "dtype must be .* with, a; got b"),
    ({"dtype": "a"}, "model must be .* with, x; got nothing"),
    ({"dtype": "a", "model": "x", "more": "1"}, "more .* with, nothing; got 1"),
  ],
)
def test_answers_of_another_model_are_not_gone_on_with(path, later, message):
  settings = {"dtype": "a", "model": "x"}
  with Journal(path, settings) as journal:
    journal.accept(request("first"))
  text = path.read_text()
  with pytest.raises(ConfigError, match=message):
    Journal(path, later)
  assert path.read_text() == text
  with Journal(path, settings) as journal:
    assert [each.request_id for each in journal.unfinished] == ["first"]


def test_a_folder_is_no_journal(tmp_path):
  with pytest.raises(ConfigError, match=r"can be read and written; got"):
    Journal(tmp_path)


def test_lines_are_json(path):
  with Journal(path) as journal:
    journal.accept(request("first"))
  first, second = map(json.loads, path.read_text().splitlines())
  assert first == {"journal": 2, "settings": {}}
  assert second["accepted"]["prompt_token_ids"] == [1, 2, 3]


def test_another_request_of_the_same_name_is_not_taken_for_the_first(path):
  first = request("one", stop=("x", "y"), temperature=0.7, seed=11)
  with Journal(path) as journal:
    journal.accept(first)
    journal.end(output("one"))
  with Journal(path) as journal:
    assert journal.has(first)
    assert not journal.has(request("two"))
    others = (
      dataclasses.replace(first, prompt_token_ids=(1, 2, 4)),
      request("one", stop=("x", "y"), temperature=0.7, seed=12),
    )
    for other in others:
      with pytest.raises(RequestError, match=r"same prompt .* another 'one'"):
        journal.has(other)
