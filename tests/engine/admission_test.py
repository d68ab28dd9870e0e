"""Requests are checked before they are taken."""

import numpy as np
import pytest

from infinite_llm.engine.admission import as_token_ids
from infinite_llm.errors import RequestError


@pytest.mark.parametrize(
  "prompt",
  [
    [5, 6],
    (5, 6),
    range(5, 7),
    np.array([5, 6]),
    np.array([5, 6], np.uint8),
    [np.int32(5), np.int64(6)],
  ],
)
def test_token_ids_become_plain_integers(prompt):
  tokens = as_token_ids(prompt)
  assert tokens == (5, 6)
  assert {type(token) for token in tokens} == {int}


@pytest.mark.parametrize(
  ("prompt", "text"),
  [
    (7, "prompt must be a text or a sequence of token ids; got 7"),
    (np.array(7), "prompt must be a text or a sequence of token ids"),
    ([5, "x"], "prompt token ids must be integers; got 'x'"),
    (np.array([5.0]), "prompt token ids must be integers; got np.float64"),
    (np.array([True]), "prompt token ids must be integers; got np.True_"),
    (np.array([[5, 6]]), "prompt token ids must be integers; got array"),
  ],
)
def test_what_is_none_is_refused(prompt, text):
  with pytest.raises(RequestError, match=text):
    as_token_ids(prompt)
