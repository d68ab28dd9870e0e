"""Outputs are views of one record that grows."""

import pytest

from infinite_llm.engine.outputs import (
  Extent,
  OutputRecord,
  RequestOutput,
  TokenLogprob,
)


def logprob_of(token: int) -> TokenLogprob:
  return TokenLogprob(token_id=token, logprob=-0.5, top={})


@pytest.fixture(name="record")
def _record() -> OutputRecord:
  return OutputRecord(
    token_ids=[7, 8, 9],
    pieces=["a", "bc"],
    logprobs=[logprob_of(token) for token in (7, 8, 9)],
  )


def output_of(record: OutputRecord, seen: Extent) -> RequestOutput:
  return RequestOutput(
    uid=1,
    request_id="r",
    prompt_token_ids=(1, 2),
    finish_reason=None,
    error=None,
    instance=0,
    record=record,
    extent=record.extent,
    seen=seen,
  )


def test_what_is_new_begins_where_the_last_one_ended(record):
  output = output_of(record, Extent(2, 1))
  assert output.token_ids == (7, 8, 9)
  assert output.new_token_ids == (9,)
  assert output.text == "abc"
  assert output.new_text == "bc"
  assert [each.token_id for each in output.logprobs] == [7, 8, 9]


def test_an_output_never_changes(record):
  output = output_of(record, Extent())
  record.token_ids.append(10)
  record.pieces.append("d")
  record.logprobs.append(logprob_of(10))
  assert output.token_ids == output.new_token_ids == (7, 8, 9)
  assert output.text == output.new_text == "abc"
  assert len(output.logprobs) == 3


def test_a_reader_who_missed_outputs_sees_all_that_is_new(record):
  output = output_of(record, Extent(2, 1))
  assert output.after(Extent()).new_token_ids == (7, 8, 9)
  assert output.after(Extent()).new_text == "abc"
  assert output.after(output.extent).new_token_ids == ()
  assert output.after(output.extent).new_text == ""


def test_logprobs_that_were_not_asked_for_are_none():
  record = OutputRecord(token_ids=[7], pieces=[], logprobs=None)
  assert output_of(record, Extent()).logprobs is None


def test_outputs_share_their_record(record):
  outputs = [output_of(record, Extent()) for _ in range(2)]
  assert outputs[0].record is outputs[1].record
