import dataclasses

import pytest

from infinite_llm.types import PoolCounts

_COUNTS = PoolCounts(used=1, free=2, hosted=0, reserved=0, total=3)


class TestValueType:
  def test_values_are_their_fields(self):
    other = dataclasses.replace(_COUNTS)
    assert other is not _COUNTS
    assert other == _COUNTS
    assert {other, _COUNTS} == {_COUNTS}
    assert dataclasses.replace(_COUNTS, free=3) != _COUNTS

  def test_fields_are_named(self):
    with pytest.raises(TypeError, match="positional"):
      PoolCounts(1, 2, 0, 0, 3)

  def test_there_are_no_other_fields(self):
    with pytest.raises(AttributeError, match="lent"):
      _COUNTS.lent = 1
