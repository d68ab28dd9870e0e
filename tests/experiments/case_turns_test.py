"""Who has the devices when, with threads in place of processes."""

import concurrent.futures
import threading

import pytest
from ml_collections import ConfigDict

from experiments.case_turns import SEPARATE, SHARING, CaseTurns


def config(folder, *cases: str) -> ConfigDict:
  (folder / "barrier").mkdir()
  return ConfigDict(
    {
      "cases": cases,
      "cluster": {"num_instances": 2, "patience_s": 20.0},
      "child": {"folder": str(folder)},
    }
  )


def events(folder, cases, parties) -> list[tuple[str, int, int]]:
  """When each party, a case and a number, had its turns: in this order."""
  shared, lock, seen = config(folder, *cases), threading.Lock(), []

  def take_part(case: str, number: int) -> None:
    turns = CaseTurns(shared, case, number, meanwhile=lambda: None)
    for repeat in range(2):
      with turns.turn(repeat), lock:
        seen.append((case, repeat, number))

  with concurrent.futures.ThreadPoolExecutor(len(parties)) as threads:
    for each in [threads.submit(take_part, *party) for party in parties]:
      each.result()
  return seen


def test_a_repeat_of_each_case_follows_one_of_the_other(tmp_path):
  parties = [(SEPARATE, 0), (SEPARATE, 1), (SHARING, 0)]
  seen = events(tmp_path, (SHARING, "spilling", SEPARATE), parties)
  assert [sorted(seen[:2]), seen[2], sorted(seen[3:5]), seen[5]] == [
    [(SEPARATE, 0, 0), (SEPARATE, 0, 1)],
    (SHARING, 0, 0),
    [(SEPARATE, 1, 0), (SEPARATE, 1, 1)],
    (SHARING, 1, 0),
  ]


@pytest.mark.parametrize(
  ("case", "parties"),
  [(SEPARATE, [(SEPARATE, 0), (SEPARATE, 1)]), (SHARING, [(SHARING, 0)])],
)
def test_nobody_waits_for_a_case_that_is_not_run(tmp_path, case, parties):
  seen = events(tmp_path, (case,), parties)
  assert len(seen) == 2 * len(parties)
