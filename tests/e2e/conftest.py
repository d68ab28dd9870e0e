"""The engine that the tests of this folder share."""

import pytest

from tests.e2e.rig import clean_rig, right_answers


@pytest.fixture
def rig(monkeypatch):
  """An idle engine whose devices and messages a test may disturb."""
  rig = clean_rig()
  right_answers()  # Before anything is disturbed.
  with rig.watch(monkeypatch):
    yield rig
