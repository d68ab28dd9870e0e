"""Outputs that another process generated are told piece by piece."""

from infinite_llm.engine.news import RemoteRequest, news_of, outputs_of
from infinite_llm.engine.outputs import (
  Extent,
  OutputRecord,
  RequestOutput,
  TokenLogprob,
)
from infinite_llm.errors import CoverageError
from infinite_llm.sampling_params import SamplingParams


def _logprob(token: int) -> TokenLogprob:
  return TokenLogprob(
    token_id=token, logprob=-0.5 * token, top={token: -0.5 * token, 3: -9.0}
  )


class _Here:
  """A request of this process: its record, and an output for each step."""

  def __init__(self, *, has_logprobs: bool, uid: int = 1):
    self.uid = uid
    self.record = OutputRecord(
      token_ids=[], pieces=[], logprobs=[] if has_logprobs else None
    )

  def step(
    self,
    *tokens: int,
    finish_reason: str | None = None,
    error: Exception | None = None,
  ) -> RequestOutput:
    seen = self.record.extent
    self.record.token_ids.extend(tokens)
    self.record.pieces.extend(f"<{token}>" for token in tokens)
    if self.record.logprobs is not None:
      self.record.logprobs.extend(map(_logprob, tokens))
    return RequestOutput(
      uid=self.uid,
      request_id="r",
      prompt_token_ids=(1, 2),
      finish_reason=finish_reason,
      error=error,
      instance=3,
      record=self.record,
      extent=self.record.extent,
      seen=seen,
    )


def _there(*, logprobs: int | None) -> RemoteRequest:
  return RemoteRequest(1, "r", 3, (1, 2), SamplingParams(logprobs=logprobs))


def test_news_add_up_to_what_was_generated():
  here, there = _Here(has_logprobs=True), _there(logprobs=2)
  first = there.take(news_of(here.step(5, 6)))
  last = there.take(news_of(here.step(7, finish_reason="stop")))

  assert (first.token_ids, first.text) == ((5, 6), "<5><6>")
  assert first.logprobs == (_logprob(5), _logprob(6))
  assert not first.is_finished
  assert (last.token_ids, last.new_token_ids) == ((5, 6, 7), (7,))
  assert (last.text, last.new_text) == ("<5><6><7>", "<7>")
  assert last.logprobs == (_logprob(5), _logprob(6), _logprob(7))
  assert (last.finish_reason, last.error, last.instance) == ("stop", None, 3)


def test_requests_that_got_a_token_and_go_on_are_told_by_columns():
  one, other = (_Here(has_logprobs=False, uid=uid) for uid in (1, 2))
  asking = _Here(has_logprobs=True, uid=3)
  rest = [asking.step(4), one.step(9, finish_reason="stop")]
  message = outputs_of([other.step(5), other.step(6), *rest, other.step(7)])

  assert (message.uids, message.token_ids) == ((2, 2, 2), (5, 6, 7))
  assert message.texts == ("<5>", "<6>", "<7>")
  assert message.news == tuple(map(news_of, rest))


def test_no_token_overtakes_news_of_its_request():
  here, there = _Here(has_logprobs=False), _there(logprobs=None)
  outputs = [here.step(4), here.step(5, 6), here.step(7)]
  message = outputs_of(outputs)

  assert message.uids == (1,)
  assert there.take_token(message.token_ids[0], message.texts[0]).text == "<4>"
  seen = [there.take(news) for news in message.news]
  assert [output.new_token_ids for output in seen] == [(5, 6), (7,)]
  assert seen[-1].text == "<4><5><6><7>"


def test_a_token_without_text_adds_none():
  there = _there(logprobs=None)
  assert not there.has_token
  output = there.take_token(8, "")
  assert there.has_token
  assert (output.new_token_ids, output.text) == ((8,), "")
  assert output.extent == Extent(1, 0)
  assert there.take_token(9, "x").extent == Extent(2, 1)


def test_logprobs_that_nobody_asked_for_are_none():
  there = _there(logprobs=None)
  assert there.take(news_of(_Here(has_logprobs=False).step(5))).logprobs is None


def test_an_error_arrives_as_what_it_was():
  here, there = _Here(has_logprobs=False), _there(logprobs=None)
  output = there.take(
    news_of(
      here.step(finish_reason="error", error=CoverageError("Not proved."))
    )
  )
  assert isinstance(output.error, CoverageError)
  assert str(output.error) == "Not proved."


def test_what_ends_here_keeps_what_has_come():
  here, there = _Here(has_logprobs=False), _there(logprobs=None)
  there.take(news_of(here.step(5)))
  output = there.ended("abort")
  assert (output.token_ids, output.finish_reason) == ((5,), "abort")
  assert output.extent == Extent(1, 1)
