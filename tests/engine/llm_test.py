"""The library entry, with the default scheduler, over two instances.

One `LLM` serves all tests of this module, since compiling is what costs. After
each of them nothing may be left, and nothing may have been compiled.
"""

import dataclasses
import gc
import math

import numpy as np
import pytest

from infinite_llm import LLM, SamplingParams
from infinite_llm.config import MAX_PROGRAM_KINDS
from infinite_llm.errors import CapacityError, RequestError
from tests.testing import (
  SamplingOracle,
  pools_are_empty,
  write_shallow_checkpoint,
)
from tests.tolerances import tolerance

MAX_TOKENS = 1024
CAPACITY = 2 * 39 * 16  # Tokens of both pools.


@pytest.fixture(scope="module", name="shared")
def _llm(tmp_path_factory):
  checkpoint = write_shallow_checkpoint(tmp_path_factory.mktemp("llm"))
  return LLM(
    checkpoint,
    num_instances=2,
    block_size=16,
    num_blocks=40,
    headroom_blocks=0,
    resend_after_s=0.01,
    heartbeat_every_s=0.005,
    show_progress=False,
  )


@pytest.fixture(name="llm")
def _clean_llm(shared):
  """The one `LLM`; checks that a test leaves it as it was."""
  yield shared
  assert is_idle(shared)
  assert pools_are_empty(shared.engine)
  assert shared.engine.runner.programs.num_late_compiles == 0


@pytest.fixture(scope="module", name="oracle")
def _oracle(shared):
  return SamplingOracle(shared.model.dense(), MAX_TOKENS)


def prompt_of(length: int, seed: int = 0) -> list[int]:
  return np.random.default_rng(seed).integers(3, 256, length).tolist()


def greedy(count: int, **options) -> SamplingParams:
  return SamplingParams(max_tokens=count, ignore_eos=True, **options)


def is_idle(llm: LLM) -> bool:
  """Whether no request runs; last outputs may still lie in the engine."""
  return not any(batcher.has_work for batcher in llm.engine.batchers)


def joined(outputs) -> tuple[tuple[int, ...], str]:
  """Tokens and text of a stream, put together from what was new each time."""
  tokens = tuple(t for output in outputs for t in output.new_token_ids)
  return tokens, "".join(output.new_text for output in outputs)


def check(oracle, output, sampling):
  prompt = list(output.prompt_token_ids)
  expected = oracle.tokens(prompt, output.token_ids, sampling)
  assert list(output.token_ids) == expected


class TestGenerate:
  def test_a_text_gives_one_output(self, llm, oracle):
    (output,) = llm.generate("Hello there", greedy(7))
    assert output.prompt_token_ids == tuple(llm.tokenize("Hello there"))
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 7
    decode = llm.model.tokenizer.decode
    assert output.text == decode(list(output.token_ids))
    check(oracle, output, greedy(7))

  @pytest.mark.parametrize(
    "convert", [list, tuple, np.array, lambda ids: list(np.array(ids))]
  )
  def test_token_ids_are_one_prompt(self, llm, oracle, convert):
    ids = prompt_of(20)
    (output,) = llm.generate(convert(ids), greedy(3))
    assert output.prompt_token_ids == tuple(ids)
    assert all(type(token) is int for token in output.prompt_token_ids)
    check(oracle, output, greedy(3))

  def test_order_is_kept_and_parameters_are_each_prompts_own(self, llm, oracle):
    prompts = ["A long one " * 20, [5, 6, 7], "b", np.array(prompt_of(130))]
    params = [greedy(count, seed=3) for count in (2, 11, 5, 1)]
    params[1] = greedy(11, seed=3, temperature=1.5)
    outputs = llm.generate(prompts, params)
    for output, prompt, each in zip(outputs, prompts, params, strict=True):
      assert output.prompt_token_ids == tuple(llm.tokenize(prompt))
      assert len(output.token_ids) == each.max_tokens
      check(oracle, output, each)

  def test_more_prompts_than_run_at_once_are_all_answered(self, llm, oracle):
    prompts = [prompt_of(1 + n % 23, seed=n) for n in range(40)]
    outputs = llm.generate(prompts, greedy(4))
    for output, prompt in zip(outputs, prompts, strict=True):
      assert output.prompt_token_ids == tuple(prompt)
      check(oracle, output, greedy(4))

  def test_nothing_asked_is_nothing_answered(self, llm):
    assert llm.generate([]) == []

  def test_default_is_greedy(self, llm, oracle):
    (output,) = llm.generate([9, 8, 7])
    assert len(output.token_ids) <= SamplingParams().max_tokens
    check(oracle, output, SamplingParams())

  def test_what_the_checkpoint_says_is_the_default(self, llm, monkeypatch):
    generation = dataclasses.replace(
      llm.model.generation, sampling=greedy(3, temperature=0.7, seed=5)
    )
    model = dataclasses.replace(llm.model, generation=generation)
    monkeypatch.setattr(llm, "model", model)
    wanted = llm.generate("Hello", generation.sampling)[0].token_ids
    assert len(wanted) == 3
    assert llm.generate("Hello")[0].token_ids == wanted
    *_, last = llm.stream("Hello")
    assert last.token_ids == wanted

  def test_an_interrupt_in_a_step_leaves_nothing_behind(
    self, llm, oracle, monkeypatch
  ):
    local_step, count = llm.engine.runner.local_step, iter(range(100))

    def interrupted(*args, **options):
      if next(count) == 3:
        raise KeyboardInterrupt
      return local_step(*args, **options)

    with monkeypatch.context() as patch:
      patch.setattr(llm.engine.runner, "local_step", interrupted)
      with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt_of(30, seed=n) for n in range(3)], greedy(50))
    assert is_idle(llm)
    (output,) = llm.generate(prompt_of(30), greedy(5))
    check(oracle, output, greedy(5))

  def test_an_interrupt_leaves_nothing_behind(self, llm, monkeypatch):
    step, count = llm.engine.step, iter(range(100))

    def interrupted():
      if next(count) == 3:
        raise KeyboardInterrupt
      return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
      llm.generate([prompt_of(30, seed=n) for n in range(3)], greedy(50))
    assert is_idle(llm)

  def test_a_context_larger_than_a_pool_is_served(self, llm, oracle):
    prompts = [prompt_of(800), prompt_of(10)]
    outputs = llm.generate(prompts, greedy(4))
    assert llm.engine.group.num_blocks_moved > 0
    for output in outputs:
      check(oracle, output, greedy(4))


class TestStream:
  def test_new_texts_join_to_the_text(self, llm):
    outputs = list(llm.stream("Once upon a time", greedy(20)))
    assert [o.is_finished for o in outputs] == [False] * 19 + [True]
    assert [len(o.token_ids) for o in outputs] == list(range(1, 21))
    text = ""
    for output in outputs:
      text += output.new_text
      assert output.text == text
    (whole,) = llm.generate("Once upon a time", greedy(20))
    assert (outputs[-1].text, outputs[-1].token_ids) == (
      whole.text,
      whole.token_ids,
    )

  def test_leaving_early_frees_everything(self, llm):
    for output in llm.stream(prompt_of(700), greedy(200)):
      if len(output.token_ids) == 3:
        break
    del output
    assert is_idle(llm)
    assert pools_are_empty(llm.engine)

  def test_closing_ends_a_stream(self, llm):
    stream = llm.stream([4, 5], greedy(50))
    next(stream)
    stream.close()
    assert list(stream) == []
    stream.close()

  def test_a_stream_that_nobody_reads_is_dropped(self, llm):
    stream = llm.stream([4, 5], greedy(50))
    del stream
    gc.collect()
    assert is_idle(llm)

  def test_an_iterator_dropped_in_the_middle_of_a_step_ends_after_it(
    self, llm, monkeypatch
  ):
    streams = [llm.stream([4, 5], greedy(50)) for _ in range(2)]
    step = llm.engine.step

    def dropping():
      # A later step, if the dropped request's was over first, drops nothing.
      if streams[1:]:
        streams[1:] = []
        # The step must not see its request vanish.
        assert sum(len(b.waiting) for b in llm.engine.batchers) == 2
      return step()

    with monkeypatch.context() as patch:
      patch.setattr(llm.engine, "step", dropping)
      next(streams[0])
    next(streams[0])
    assert sum(len(b.running) for b in llm.engine.batchers) == 1
    streams.clear()

  def test_interleaved_streams_both_complete(self, llm, oracle):
    first = llm.stream(prompt_of(40), greedy(12))
    second = llm.stream(prompt_of(50, seed=1), greedy(9))
    turns = [[], []]
    while not all(turn and turn[-1].is_finished for turn in turns):
      for stream, turn in zip((first, second), turns, strict=True):
        turn += [output] if (output := next(stream, None)) else []
    for instance, (turn, count) in enumerate(zip(turns, (12, 9), strict=True)):
      assert {output.instance for output in turn} == {instance}
      assert len(turn[-1].token_ids) == count
      assert turn[-1].finish_reason == "length"
      check(oracle, turn[-1], greedy(12))
      assert joined(turn) == (turn[-1].token_ids, turn[-1].text)

  def test_a_stream_goes_on_while_others_are_generated(self, llm, oracle):
    stream = llm.stream([1, 2, 3], greedy(30))
    outputs = [next(stream)]
    llm.generate([prompt_of(30, seed=n) for n in range(5)], greedy(6))
    # What came meanwhile is one output, and the first is what it was.
    outputs.append(next(stream))
    assert len(outputs[0].token_ids) == 1
    assert len(outputs[1].new_token_ids) >= 5
    outputs += stream
    check(oracle, outputs[-1], greedy(30))
    assert joined(outputs) == (outputs[-1].token_ids, outputs[-1].text)

  def test_what_others_step_is_read_later(self, llm, oracle):
    stream = llm.stream([1, 2, 3], greedy(9))
    outputs = [next(stream)]
    for _ in range(4):
      llm.engine.step()
    outputs += stream
    assert [len(output.token_ids) for output in outputs] == [1, 6, 7, 8, 9]
    assert joined(outputs) == (outputs[-1].token_ids, outputs[-1].text)
    check(oracle, outputs[-1], greedy(9))

  def test_an_end_that_others_got_is_an_error(self, llm):
    stream = llm.stream([1, 2, 3], greedy(3))
    while llm.engine.has_unfinished():
      llm.engine.step()
    with pytest.raises(RequestError, match=r"went to another caller of engine"):
      next(stream)
    stream.close()

  def test_an_abort_by_name_ends_a_stream(self, llm):
    stream = llm.stream([1, 2, 3], greedy(30))
    name = next(stream).request_id
    llm.engine.abort(name)
    assert [output.finish_reason for output in stream] == ["abort"]

  def test_an_instance_can_be_asked_for(self, llm):
    for instance in (1, 0):
      *_, last = llm.stream("here", greedy(2), instance=instance)
      assert last.instance == instance


class TestSampling:
  @pytest.mark.parametrize(
    "options",
    [
      {"temperature": 0.7},
      {"temperature": 3.0, "top_k": 5},
      {"temperature": 3.0, "top_p": 0.4},
      {"temperature": 3.0, "min_p": 0.05},
      {"repetition_penalty": 1.8},
      {"temperature": 1.0, "repetition_penalty": 0.5, "top_k": 30},
      {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ],
  )
  def test_tokens_are_those_of_the_oracle(self, llm, oracle, options):
    for length, seed in ((9, 1), (140, 2)):
      sampling = greedy(16, seed=seed, **options)
      (output,) = llm.generate(prompt_of(length), sampling)
      check(oracle, output, sampling)

  @pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
  )
  def test_keeping_one_token_is_greedy(self, llm, options):
    prompt = prompt_of(25)
    narrow = greedy(10, temperature=1.0, seed=5, **options)
    outputs = llm.generate([prompt, prompt], [narrow, greedy(10)])
    assert outputs[0].token_ids == outputs[1].token_ids

  def test_a_seed_decides_whatever_runs_beside_it(self, llm):
    prompt = prompt_of(33)
    sampling = greedy(12, temperature=1.2, seed=77)
    (alone,) = llm.generate(prompt, sampling)
    others = [prompt_of(5 + 9 * n, seed=n) for n in range(9)]
    streams = [llm.stream(prompt, sampling, instance=n) for n in (0, 1)]
    llm.generate(others, greedy(8, temperature=1.0))
    for n, stream in enumerate(streams):
      *_, last = stream
      assert last.instance == n
      assert last.token_ids == alone.token_ids

  def test_requests_without_a_seed_differ(self, llm):
    outputs = llm.generate([[5, 6, 7]] * 3, greedy(8, temperature=2.0))
    assert len({output.token_ids for output in outputs}) == 3

  def test_logprobs_are_those_of_the_model(self, llm, oracle):
    prompt = prompt_of(60)
    for options in ({}, {"temperature": 2.0, "top_k": 9, "seed": 1}):
      sampling = greedy(6, logprobs=4, repetition_penalty=1.3, **options)
      (output,) = llm.generate(prompt, sampling)
      logits = oracle.logits(prompt, output.token_ids).astype(np.float64)
      shifted = logits - logits.max(-1, keepdims=True)
      dense = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
      allowed = tolerance("float32").logits
      assert len(output.logprobs) == 6
      for step, row, token in zip(
        output.logprobs, dense, output.token_ids, strict=True
      ):
        assert step.token_id == token
        assert step.logprob == pytest.approx(row[token], abs=allowed)
        assert list(step.top) == np.argsort(-row)[:4].tolist()
        assert list(step.top.values()) == pytest.approx(
          np.sort(row)[:-5:-1], abs=allowed
        )

  def test_logprobs_of_zero_report_the_chosen_token_alone(self, llm):
    outputs = llm.generate([[5, 6]] * 2, [greedy(2, logprobs=0), greedy(2)])
    assert [step.top for step in outputs[0].logprobs] == [{}, {}]
    assert all(math.isfinite(step.logprob) for step in outputs[0].logprobs)
    assert outputs[1].logprobs is None
    assert outputs[0].token_ids == outputs[1].token_ids


@pytest.fixture(scope="module", name="sampled")
def _sampled(shared):
  """400 tokens drawn almost evenly, some of them special."""
  sampling = greedy(400, temperature=50.0, seed=0)
  (output,) = shared.generate([5, 6, 7], sampling)
  return output


class TestEndings:
  def again(self, llm, **options):
    sampling = SamplingParams(
      max_tokens=400, temperature=50.0, seed=0, **options
    )
    (output,) = llm.generate([5, 6, 7], sampling)
    return output

  def test_end_of_sequence_ends_and_is_the_last_token(self, llm, sampled):
    eos = llm.model.generation.eos_token_ids[0]
    end = sampled.token_ids.index(eos) + 1
    output = self.again(llm)
    assert output.finish_reason == "stop"
    assert output.token_ids == sampled.token_ids[:end]
    assert "</s>" not in output.text
    shown = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert self.again(llm, **shown).text.endswith("</s>")
    shown["include_stop_str_in_output"] = False
    assert not self.again(llm, **shown).text.endswith("</s>")

  def test_end_of_sequence_can_be_ignored(self, llm, sampled):
    assert sampled.finish_reason == "length"
    assert len(sampled.token_ids) == 400
    assert llm.model.generation.eos_token_ids[0] in sampled.token_ids

  def test_a_stop_token_ends(self, llm, sampled):
    stop = sampled.token_ids[30]
    end = sampled.token_ids.index(stop) + 1
    output = self.again(llm, ignore_eos=True, stop_token_ids=[stop])
    assert output.finish_reason == "stop"
    assert output.token_ids == sampled.token_ids[:end]
    decode = llm.model.tokenizer.decode
    assert output.text == decode(list(output.token_ids[:-1]))
    output = self.again(
      llm,
      ignore_eos=True,
      stop_token_ids=[stop],
      include_stop_str_in_output=True,
    )
    assert output.text == decode(list(output.token_ids))
    assert len(decode([stop])) > 0

  def test_a_stop_string_ends_before_itself(self, llm, sampled):
    tokenizer = llm.model.tokenizer
    # Two printable characters in a row, over a token boundary.
    pairs = [
      tokenizer.decode(list(sampled.token_ids[i : i + 2])) for i in range(399)
    ]
    stop = next(p for p in pairs[20:] if len(p) == 2 and p.isprintable())
    output = self.again(llm, ignore_eos=True, stop=["never in it", stop])
    assert output.finish_reason == "stop"
    before = sampled.text[: sampled.text.index(stop)]
    assert output.text == before
    with_stop = self.again(
      llm, ignore_eos=True, stop=stop, include_stop_str_in_output=True
    )
    assert with_stop.text == before + stop
    assert len(output.token_ids) < 400
    streamed = llm.stream(
      [5, 6, 7],
      SamplingParams(
        max_tokens=400, temperature=50.0, seed=0, ignore_eos=True, stop=stop
      ),
    )
    assert "".join(o.new_text for o in streamed) == output.text

  def test_the_end_of_all_memory_is_an_end(self, llm):
    (output,) = llm.generate(prompt_of(CAPACITY - 5), greedy(50))
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 5


class TestChat:
  def test_a_conversation_is_framed_by_the_template(self, llm, oracle):
    messages = [
      {"role": "user", "content": "Hi!"},
      {"role": "assistant", "content": " Yes?"},
      {"role": "user", "content": " Bye."},
    ]
    (output,) = llm.chat(messages, greedy(4))
    tokenizer = llm.model.tokenizer
    text = tokenizer.encode("Hi! Yes? Bye.").ids
    bos = llm.model.generation.bos_token_id
    assert output.prompt_token_ids == (bos, *text)
    check(oracle, output, greedy(4))

  def test_several_conversations_keep_their_order(self, llm):
    chats = [[{"role": "user", "content": text}] for text in ("one", "twenty")]
    outputs = llm.chat(chats, [greedy(2), greedy(3)])
    assert [len(output.prompt_token_ids) for output in outputs] == [4, 7]
    assert [len(output.token_ids) for output in outputs] == [2, 3]


BAD_REQUESTS = {
  "empty text": (
    "",
    {},
    RequestError,
    r"prompt must have at least one token; got ''\.",
  ),
  "no token": (
    [],
    {},
    RequestError,
    r"prompt must have at least one token; got none\.",
  ),
  "token too large": (
    [5, 256],
    {},
    RequestError,
    r"prompt token ids must be in \[0, 256\); got 256\.",
  ),
  "token negative": (
    [-1, 5],
    {},
    RequestError,
    r"prompt token ids must be in \[0, 256\); got -1\.",
  ),
  "token of text": (
    [5, "six"],
    {},
    RequestError,
    r"prompt token ids must be integers; got 'six'\.",
  ),
  "token of fractions": (
    [5.5],
    {},
    RequestError,
    r"prompt token ids must be integers; got 5\.5\.",
  ),
  "not a prompt": (
    None,
    {},
    RequestError,
    r"prompt must be a text or a sequence of token ids; got None\.",
  ),
  "larger than all memory": (
    prompt_of(CAPACITY),
    {},
    CapacityError,
    rf"needs room for {CAPACITY + 1} tokens .* hold {CAPACITY}: 2 instance",
  ),
  "too many logprobs": (
    [5],
    {"sampling": SamplingParams(logprobs=6)},
    RequestError,
    r"logprobs must be at most max_logprobs = 5; got 6\.",
  ),
  "no sampling": (
    [5],
    {"sampling": {"max_tokens": 5}},
    RequestError,
    r"sampling must be SamplingParams; got \{'max_tokens': 5\}\.",
  ),
  "unknown instance": (
    [5],
    {"instance": 2},
    RequestError,
    r"instance must be in \[0, 2\); got 2\.",
  ),
  "instance by name": (
    [5],
    {"instance": "first"},
    RequestError,
    r"instance must be in \[0, 2\); got 'first'\.",
  ),
}


class TestBadRequests:
  """Each is refused by name, and a running request does not notice."""

  @pytest.fixture(autouse=True)
  def _beside_a_running_request(self, llm, oracle):
    stream = llm.stream(prompt_of(37), greedy(8))
    outputs = [next(stream), next(stream)]
    counts = llm.engine.pool_counts()
    yield
    assert llm.engine.pool_counts() == counts
    assert sum(len(b.running) for b in llm.engine.batchers) == 1
    assert not any(b.waiting for b in llm.engine.batchers)
    outputs += stream
    assert outputs[-1].finish_reason == "length"
    assert [len(o.token_ids) for o in outputs] == list(range(1, 9))
    check(oracle, outputs[-1], greedy(8))

  @pytest.mark.parametrize("name", BAD_REQUESTS)
  def test_it_is_refused(self, llm, name):
    prompt, options, error_type, message = BAD_REQUESTS[name]
    with pytest.raises(error_type, match=message):
      llm.stream(prompt, **options)

  def test_one_bad_prompt_of_many_lets_none_run(self, llm):
    with pytest.raises(RequestError, match="at least one token"):
      llm.generate([[5, 6], []], greedy(3))

  @pytest.mark.parametrize("prompts", [["text", 5], [[5], 6.5]])
  def test_prompts_and_tokens_do_not_mix(self, llm, prompts):
    with pytest.raises(RequestError, match="must be a text or a sequence of"):
      llm.generate(prompts)

  def test_parameters_must_be_as_many_as_prompts(self, llm):
    with pytest.raises(RequestError, match=r"one per prompt \(3\); got 2\."):
      llm.generate([[5], [6], [7]], [greedy(1)] * 2)

  def test_a_bad_conversation_is_refused(self, llm):
    with pytest.raises(RequestError, match=r"role.* did you mean 'user'\?"):
      llm.chat([{"role": "usr", "content": "Hi"}])


def test_few_programs_are_compiled(llm):
  # Behind the names of the others stands an instance or a shift.
  whole_mesh = ("group_decode", "group_prefill", "verify")
  kinds = {
    (name, *shape) if name in whole_mesh else (name, *shape[1:])
    for name, *shape in llm.engine.runner.programs
  }
  assert len(kinds) < len(llm.engine.runner.programs)
  assert len(kinds) == llm.engine.config.num_program_kinds, sorted(kinds)
  assert len(kinds) <= MAX_PROGRAM_KINDS


def test_a_varied_workload_compiles_nothing(llm, oracle):
  # Every kind of program, in every bucket, with every way of sampling; that
  # nothing was compiled is checked after each test.
  rng = np.random.default_rng(3)
  llm.engine.runner.launches.clear()
  kinds = (
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.1, "min_p": 0.05},
    {"repetition_penalty": 1.2},
    {"logprobs": 5},
    {"stop": ["zz"], "stop_token_ids": [9]},
  )
  lengths = [700, 1, 128, 129, *rng.integers(1, 200, 30)]
  params = [
    SamplingParams(
      max_tokens=int(rng.integers(1, 20)), seed=n, **kinds[n % len(kinds)]
    )
    for n in range(len(lengths))
  ]
  prompts = [prompt_of(int(n), seed=i) for i, n in enumerate(lengths)]
  for output, each in zip(llm.generate(prompts, params), params, strict=True):
    assert output.finish_reason in ("stop", "length"), output.error
    check(oracle, output, each)
  launched = llm.engine.runner.launches
  assert {"local_decode", "local_prefill", "group_decode", "group_prefill"} <= (
    set(launched)
  )
