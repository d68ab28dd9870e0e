"""What every loader returns: a model on its mesh, and how to speak to it."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from infinite_llm.config import DTYPES
from infinite_llm.errors import ConfigError
from infinite_llm.models.registry import ModelConfig
from infinite_llm.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
  """What a checkpoint says about ending and framing a text.

  Attributes:
    eos_token_ids: Tokens that end an answer; may be empty.
    bos_token_id: Token that begins a text, if the model wants one.
    bos_token: The same as text, for chat templates.
    eos_token: The first end token as text, for chat templates.
    chat_template: Jinja source that renders a conversation, if there is one.
  """

  eos_token_ids: tuple[int, ...] = ()
  bos_token_id: int | None = None
  bos_token: str | None = None
  eos_token: str | None = None
  chat_template: str | None = None

  def __post_init__(self):
    object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
  """A model whose weights lie on a mesh.

  Attributes:
    config: Its shape.
    graphdef: Static, hashable part of the `Transformer`, with `tensor_axis`
      set: `nnx.merge(graphdef, state)` is for use inside `jax.shard_map`.
    state: Nested dict of weights: sharded over "tensor", replicated over
      "instance"; `param_specs` describes it.
    mesh: ("instance", "tensor") mesh that they lie on.
    tokenizer: Text to tokens and back; None if the checkpoint has none.
    generation: Defaults for generation.
    kv_scales: `[L, 2, K]` float32. What keys and values in float8_e4m3fn are to
      be multiplied by; None if the checkpoint has none.
  """

  config: ModelConfig
  graphdef: nnx.GraphDef
  state: Any
  mesh: Mesh
  tokenizer: Tokenizer | None = None
  generation: GenerationDefaults = dataclasses.field(
    default_factory=GenerationDefaults
  )
  kv_scales: np.ndarray | None = None

  @property
  def dtype(self) -> np.dtype:
    """Dtype of weights and activations."""
    return jax.tree.leaves(self.state)[0].dtype

  def dense(self) -> Transformer:
    """The module for use outside `jax.shard_map`, without collectives."""
    model = nnx.merge(self.graphdef, self.state)
    model.tensor_axis = None
    return model


def resolve_dtype(dtype: DTypeLike) -> np.dtype:
  """Checks the dtype that weights are to have.

  Args:
    dtype: Name or dtype.

  Returns:
    It as a NumPy dtype.

  Raises:
    ConfigError: If no model can be loaded with it.
  """
  try:
    resolved = np.dtype(dtype)
  except TypeError:
    resolved = None
  if resolved is None or resolved.name not in DTYPES:
    name = dtype if resolved is None else resolved.name
    raise ConfigError(
      f"dtype must be one of {', '.join(DTYPES)}; got {name!r}."
    )
  return resolved
