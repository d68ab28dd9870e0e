"""The library entry: load a model, hand in prompts, get text."""

import contextlib
import dataclasses
import functools
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import tqdm

from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.distributed.runtime import ProcessGroup
from infinite_llm.engine.admission import as_token_ids
from infinite_llm.engine.chat import ChatTemplate, Message
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.group_engine import GroupEngine
from infinite_llm.engine.member import load_model, say_open
from infinite_llm.engine.outputs import Extent, RequestOutput
from infinite_llm.errors import ConfigError, RequestError
from infinite_llm.sampling_params import SamplingParams
from infinite_llm.types import InstanceId

Prompt = str | Sequence[int]


class LLM:
  """A model on one or more instances that lend each other KV memory.

  Attributes:
    engine: What runs below; for research, everything is in reach.
    model: The loaded model.
  """

  def __init__(
    self,
    model: str | os.PathLike[str],
    config: EngineConfig | None = None,
    *,
    show_progress: bool = True,
    group: ProcessGroup | None = None,
    **options: object,
  ):
    """Loads a checkpoint, allocates the pools, compiles all programs.

    Without options it takes one device, the checkpoint's dtype, and pools as
    large as memory allows.

    Args:
      model: Hugging Face folder (`config.json`, safetensors, tokenizer), or
        one that `models.checkpoint.save` wrote. With `load_format="dummy"` its
        `config.json` is enough, and weights are random.
      config: Sizes and rules; or give `options`.
      show_progress: Show bars for compilation and generation.
      group: All processes, of which this one is process 0, if the instances lie
        in several; the others run `engine.member.Member`.
      **options: Fields of the configuration by name, as `num_instances=4`,
        `block_size=64`, `num_blocks=1024`, `policy="borrow"`.

    Raises:
      ConfigError: If an option is wrong, or there are too few devices.
      CheckpointError: If the checkpoint cannot be read.
    """
    if not isinstance(model, str | os.PathLike):
      raise ConfigError(f"model must be the path of a folder; got {model!r}.")
    if config is not None and options:
      raise ConfigError(
        f"Give either config or options; got both: {', '.join(options)}."
      )
    if not isinstance(config, EngineConfig | None):
      raise ConfigError(f"config must be an EngineConfig; got {config!r}.")
    config = config or engine_config(**options)
    self._show_progress = show_progress
    self._mail: dict[str, _Mailbox] = {}
    self._left: list[str] = []
    self._is_stepping = False
    if group is not None:
      say_open(group, model, config)
    self.model = load_model(model, config)
    self.engine: Engine | GroupEngine
    if group is None:
      self.engine = Engine(self.model, config)
    else:
      self.engine = GroupEngine(self.model, config, group)
    with tqdm.tqdm(
      desc="Compiling", unit="program", disable=not show_progress
    ) as bar:

      def progress(name: str, done: int, total: int) -> None:
        bar.total = total
        bar.set_postfix_str(name, refresh=False)
        bar.update(done - bar.n)

      self.engine.warm_up(progress)

  def generate(
    self,
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
  ) -> list[RequestOutput]:
    """Completes prompts together.

    Blocks the host.

    Args:
      prompts: A text, a list of token ids, or a list of these.
      sampling: For all prompts, or one for each; None takes the defaults of the
        checkpoint (`generation_config.json`), greedy if it has none.

    Returns:
      One finished output per prompt, in their order. One that ended for an
      error has `finish_reason == "error"`.

    Raises:
      RequestError: If any prompt or parameter is wrong; then none is run.
    """
    batch = _as_batch(prompts)
    params = self._one_each(sampling, len(batch))
    tokens = [self.tokenize(prompt) for prompt in batch]
    for ids, each in zip(tokens, params, strict=True):
      self.engine.check(ids, each)
    outputs = []
    with contextlib.ExitStack() as stack:
      streams = []
      for ids, each in zip(tokens, params, strict=True):
        streams.append(self._open(ids, each, None))
        stack.callback(streams[-1].close)
      bar = stack.enter_context(
        tqdm.tqdm(
          total=len(streams),
          desc="Requests",
          unit="request",
          disable=not self._show_progress,
        )
      )
      for stream in streams:
        *_, last = stream
        outputs.append(last)
        bar.update()
    return outputs

  def chat(
    self,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    add_generation_prompt: bool = True,
  ) -> list[RequestOutput]:
    """Answers conversations, framed by the checkpoint's chat template.

    Blocks the host.

    Args:
      messages: A conversation: `[{"role": "user", "content": "Hello"}]`, or a
        list of conversations.
      sampling: For all conversations, or one for each; None as in `generate`.
      add_generation_prompt: Whether the template is to begin an answer.

    Returns:
      One finished output per conversation, in their order.

    Raises:
      RequestError: If the checkpoint has no chat template or no tokenizer, or
        messages or a parameter are wrong; then none is answered.
      CheckpointError: If the template is not valid Jinja.
    """
    conversations = list(messages)
    if not conversations or isinstance(conversations[0], Mapping):
      conversations = [conversations]
    texts = [
      self._chat_template.render(
        conversation, add_generation_prompt=add_generation_prompt
      )
      for conversation in conversations
    ]
    # Templates write special tokens themselves.
    prompts = [self._encode(text, add_special_tokens=False) for text in texts]
    return self.generate(prompts, sampling)

  def stream(
    self,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    *,
    instance: InstanceId | None = None,
  ) -> "OutputIterator":
    """Completes one prompt and yields as it goes.

    The request is under way from now on, in every step that anybody asks for.

    Args:
      prompt: A text or token ids.
      sampling: How to choose tokens; None is as in `generate`.
      instance: Which instance owns the request; None takes the least loaded.

    Returns:
      An output whenever there is something new, with all of it: what comes
      between two reads is one output, so a stream that nobody reads does not
      grow. The last one is finished. Dropping or closing the iterator early
      ends the request.

    Raises:
      RequestError: If the prompt or a parameter is wrong.
    """
    sampling = sampling or self.model.generation.sampling
    return self._open(self.tokenize(prompt), sampling, instance)

  def _open(
    self,
    prompt: Sequence[int],
    sampling: SamplingParams,
    instance: InstanceId | None,
  ) -> "OutputIterator":
    """Adds a request now."""
    name = self.engine.add_request(prompt, sampling, instance=instance)
    self._mail[name] = _Mailbox()
    return OutputIterator(self, name)

  def _next_output(self, name: str) -> RequestOutput:
    """Steps the engine while a request's mailbox is empty.

    Raises:
      RequestError: If the request ended and somebody else got to know it.
    """
    mailbox = self._mail[name]
    while (output := mailbox.take()) is None:
      is_unfinished = self.engine.is_unfinished(name)
      self._step()
      if mailbox.unread is None and not is_unfinished:
        raise RequestError(
          f"The last output of request {name} went to another caller of"
          " engine.step(): there is none for this stream."
        )
    return output

  def _step(self) -> None:
    """One step; its outputs go to whoever waits for them."""
    while self._left:
      self.engine.abort(self._left.pop())
    self._is_stepping = True
    try:
      outputs = self.engine.step()
      if not self.engine.has_unfinished():
        self.engine.settle()  # Nobody else would bring lent rBlocks home.
    finally:
      self._is_stepping = False
    for output in outputs:
      if output.request_id in self._mail:
        self._mail[output.request_id].unread = output

  def _leave(self, name: str) -> None:
    """Ends a request that nobody waits for any more, if it has not ended."""
    del self._mail[name]
    # A garbage collector may drop an iterator in the middle of a step.
    self._left.append(name)
    if not self._is_stepping:
      self._is_stepping = True
      try:
        self.engine.abort(self._left.pop())
        self.engine.settle()
      finally:
        self._is_stepping = False

  def _one_each(
    self, sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
  ) -> list[SamplingParams]:
    if sampling is None:
      sampling = self.model.generation.sampling
    if not isinstance(sampling, Sequence):
      return [sampling] * count
    if len(sampling) != count:
      raise RequestError(
        f"sampling must be one for all or one per prompt ({count}); got"
        f" {len(sampling)}."
      )
    return list(sampling)

  def tokenize(self, prompt: Prompt) -> list[int]:
    """Turns a prompt into token ids, as the checkpoint's tokenizer does.

    Raises:
      RequestError: If it is text and the checkpoint has no tokenizer.
    """
    if not isinstance(prompt, str):
      return list(as_token_ids(prompt))
    if not prompt:
      raise RequestError("prompt must have at least one token; got ''.")
    return self._encode(prompt, add_special_tokens=True)

  def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
    if self.model.tokenizer is None:
      raise RequestError(
        "The checkpoint has no tokenizer.json: give token ids, not text."
      )
    encoding = self.model.tokenizer.encode(
      text, add_special_tokens=add_special_tokens
    )
    return encoding.ids

  @functools.cached_property
  def _chat_template(self) -> ChatTemplate:
    # On first use: a template that is wrong disturbs nobody who has no chats.
    return ChatTemplate(self.model.generation)


@dataclasses.dataclass(kw_only=True)
class _Mailbox:
  """The newest output of one request; older ones are part of it.

  Attributes:
    unread: The output; None if there is none since the last read.
    seen: How much the last one that was read covered.
  """

  unread: RequestOutput | None = None
  seen: Extent = dataclasses.field(default_factory=Extent)

  def take(self) -> RequestOutput | None:
    """The output; new in it is all that its reader has not seen."""
    if self.unread is None:
      return None
    output = self.unread.after(self.seen)
    self.unread = None
    self.seen = output.extent
    return output


class OutputIterator(Iterator[RequestOutput]):
  """Outputs of one request, as they come."""

  def __init__(self, llm: LLM, name: str):
    """Begins with the next output.

    Args:
      llm: Steps the engine.
      name: The request's.
    """
    self._llm = llm
    self._name = name
    self._leave = weakref.finalize(self, llm._leave, name)
    self._leave.atexit = False

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> RequestOutput:
    if not self._leave.alive:
      raise StopIteration
    output = self._llm._next_output(self._name)
    if output.is_finished:
      self.close()
    return output

  def close(self) -> None:
    """Ends the request, if it has not ended."""
    self._leave()


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
  if isinstance(prompts, str):
    return [prompts]
  batch = list(prompts)
  # What has no length is a token id.
  if batch and not any(hasattr(item, "__len__") for item in batch):
    return [batch]
  return batch
