"""The library entry: load a model, hand in prompts, get text."""

import collections
import os
from collections.abc import Iterator, Sequence

import tqdm

from infinite_llm.config import EngineConfig, engine_config
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.engine.engine import Engine
from infinite_llm.engine.outputs import RequestOutput
from infinite_llm.errors import ConfigError, RequestError
from infinite_llm.models.hf_loader import load_hf
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
    **options: object,
  ):
    """Loads a checkpoint, allocates the pools, compiles all programs.

    Args:
      model: Hugging Face folder: `config.json`, safetensors, tokenizer.
      config: Sizes and rules; or give `options`.
      show_progress: Show bars for compilation and generation.
      **options: Fields of the configuration by name, as `num_instances=4`,
        `block_size=64`, `num_blocks=1024`, `policy="borrow"`.

    Raises:
      ConfigError: If an option is wrong, or there are too few devices.
      CheckpointError: If the checkpoint cannot be read.
    """
    if config is not None and options:
      raise ConfigError(
        f"Give either config or options; got both: {', '.join(options)}."
      )
    config = config or engine_config(**options)
    self._show_progress = show_progress
    self._mail: dict[str, collections.deque[RequestOutput]] = {}
    mesh = make_mesh(config.num_instances, config.tensor_parallel)
    self.model = load_hf(model, mesh, dtype=config.dtype)
    self.engine = Engine(self.model, config)
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
      sampling: For all prompts, or one for each; None is greedy.

    Returns:
      One finished output per prompt, in their order. One that ended for an
      error has `finish_reason == "error"`.

    Raises:
      RequestError: If any prompt or parameter is wrong; then none is run.
    """
    batch = _as_batch(prompts)
    params = _one_each(sampling, len(batch))
    tokens = [self.tokenize(prompt) for prompt in batch]
    for ids, each in zip(tokens, params, strict=True):
      self.engine.check(ids, each)
    streams = [
      self._open(ids, each, None, keep=1)
      for ids, each in zip(tokens, params, strict=True)
    ]
    outputs = []
    with tqdm.tqdm(
      total=len(streams),
      desc="Requests",
      unit="request",
      disable=not self._show_progress,
    ) as bar:
      for stream in streams:
        *_, last = stream
        outputs.append(last)
        bar.update()
    return outputs

  def stream(
    self,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    *,
    instance: InstanceId | None = None,
  ) -> Iterator[RequestOutput]:
    """Completes one prompt and yields as it goes.

    Args:
      prompt: A text or token ids.
      sampling: How to choose tokens; None is greedy.
      instance: Which instance owns the request; None takes the least loaded.

    Yields:
      An output per token; `new_text` is what it added. The last one is
      finished. Leaving the iterator early ends the request.

    Raises:
      RequestError: If the prompt or a parameter is wrong.
    """
    return self._open(
      self.tokenize(prompt), sampling or SamplingParams(), instance
    )

  def _open(
    self,
    prompt: Sequence[int],
    sampling: SamplingParams,
    instance: InstanceId | None,
    keep: int | None = None,
  ) -> Iterator[RequestOutput]:
    """Adds a request now; the iterator yields its last `keep` outputs."""
    name = self.engine.add_request(prompt, sampling, instance=instance)
    self._mail[name] = collections.deque(maxlen=keep)
    return self._outputs(name)

  def _outputs(self, name: str) -> Iterator[RequestOutput]:
    """Steps the engine while this request's mailbox is empty."""
    mail = self._mail[name]
    try:
      while True:
        while not mail:
          self._step()
        output = mail.popleft()
        yield output
        if output.is_finished:
          return
    finally:
      del self._mail[name]
      self.engine.abort(name)

  def _step(self) -> None:
    """One step; its outputs go to whoever waits for them."""
    for output in self.engine.step():
      if output.request_id in self._mail:
        self._mail[output.request_id].append(output)

  def tokenize(self, prompt: Prompt) -> list[int]:
    """Turns a prompt into token ids, as the checkpoint's tokenizer does.

    Raises:
      RequestError: If it is text and the checkpoint has no tokenizer.
    """
    if not isinstance(prompt, str):
      return list(prompt)
    if self.model.tokenizer is None:
      raise RequestError(
        "The checkpoint has no tokenizer.json: give token ids, not text."
      )
    if not prompt:
      raise RequestError("prompt must have at least one token; got ''.")
    return self.model.tokenizer.encode(prompt).ids


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
  if isinstance(prompts, str):
    return [prompts]
  if prompts and all(isinstance(item, int) for item in prompts):
    return [list(prompts)]
  return list(prompts)


def _one_each(
  sampling: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
  if sampling is None or isinstance(sampling, SamplingParams):
    return [sampling or SamplingParams()] * count
  if len(sampling) != count:
    raise RequestError(
      f"sampling must be one for all or one per prompt ({count}); got"
      f" {len(sampling)}."
    )
  return list(sampling)
