"""The needle checkpoint's tokenizer: byte-level BPE plus marker tokens.

Any text goes through it and comes back unchanged, since bytes are its alphabet.
What a needle's answer is made of are single tokens, whatever the corpus:

- `#name` (a definition) and `@name` or ` @name` (a reference to it);
- three digits, with a leading space where they begin a number;
- the words between them: ` is`, `; next is`, `; that is all`.

The default corpus ships with CPython, so nothing is downloaded; the same
interpreter always gives the same tokenizer.
"""

import json
import pydoc_data.topics

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"
LINK = "; next is"
"""Stands between a pass key and the reference to the next one."""
END = "; that is all"
"""Stands after the last pass key; the model ends its answer there."""

_NAMES = """
agate alder amber aspen basil beryl birch bison camel cedar chalk chive
cobalt condor copper coral crane cumin cypress egret elder elm falcon fennel
garnet ginger hazel heron hickory ibex iron jade jasper juniper kestrel larch
laurel linden lynx maple marten mint myrtle nickel nutmeg onyx opal osprey
otter pearl pewter plover poplar quartz rowan ruby saffron sage sorrel teak
thyme topaz walnut zircon
"""
NAMES = tuple(_NAMES.split())
"""Names of needles; none is the beginning of another."""

DEFAULT_VOCAB_SIZE = 4096

# Words with at most one leading space, digits in threes, runs of anything else.
_SPLIT_PATTERN = (
  r"'(?i:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "Ġ"  # How byte-level BPE writes a space.


def definition(name: str) -> str:
  """The marker that defines `name` in a text."""
  return f"#{name}"


def reference(name: str) -> str:
  """The marker that refers to the definition of `name`."""
  return f"@{name}"


def default_corpus() -> str:
  """The topic texts of CPython's `help()`: about half a megabyte of English."""
  topics = pydoc_data.topics.topics
  return "\n".join(topics[name] for name in sorted(topics))


def build_needle_tokenizer(
  *, vocab_size: int = DEFAULT_VOCAB_SIZE, corpus: str | None = None
) -> tokenizers.Tokenizer:
  """Trains the tokenizer; deterministic.

  Args:
    vocab_size: Most tokens; fewer if the corpus has no more pairs to merge.
    corpus: Text to learn merges from; None takes `default_corpus()`, and the
      empty string learns none (bytes and needle tokens only).

  Returns:
    A tokenizer whose `encode` puts `BOS_TOKEN` first unless told not to.

  Raises:
    ValueError: `vocab_size` has no room for bytes and needle tokens.
  """
  # Merges never make these, yet each must be one token: see `ignore_merges`.
  whole = [f"{n:03}" for n in range(1000)]
  whole += [f"{_SPACE}{n}" for n in range(100, 1000)]
  whole.append(f"{_SPACE}is")
  markers = [LINK, END]
  for name in NAMES:
    markers += [definition(name), reference(name), f" {reference(name)}"]
  special = [BOS_TOKEN, EOS_TOKEN]

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  least = len(alphabet) + len(whole) + len(markers) + len(special)
  if vocab_size < least:
    raise ValueError(f"vocab_size must be at least {least}; got {vocab_size}.")

  split = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_SPLIT_PATTERN), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  vocab, merges = _learn_merges(
    default_corpus() if corpus is None else corpus,
    split,
    alphabet,
    len(alphabet) + vocab_size - least,
  )
  for token in whole:
    vocab.setdefault(token, len(vocab))

  # A piece that is in the vocabulary is taken whole, as in Llama 3, so that
  # the digit groups need no merges of their own.
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
  )
  tokenizer.pre_tokenizer = split
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(special)
  tokenizer.add_tokens(
    [tokenizers.AddedToken(text, normalized=False) for text in markers]
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{BOS_TOKEN} $A",
    pair=f"{BOS_TOKEN} $A $B",
    special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))],
  )
  return tokenizer


def _learn_merges(
  corpus: str,
  split: pre_tokenizers.PreTokenizer,
  alphabet: list[str],
  vocab_size: int,
) -> tuple[dict[str, int], list[tuple[str, str]]]:
  """Returns `vocab` (token to id) and `merges` in order of rank."""
  learner = tokenizers.Tokenizer(models.BPE())
  learner.pre_tokenizer = split
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    initial_alphabet=alphabet,
    show_progress=False,
  )
  learner.train_from_iterator([corpus], trainer)
  # The Python object shows neither table; its serialised form has both.
  model = json.loads(learner.to_str())["model"]
  return model["vocab"], [tuple(pair) for pair in model["merges"]]
