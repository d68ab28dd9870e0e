"""The exchange: what arrives, what is refused, and what stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.packed_rows import place_rows
from infinite_llm.cache.table_store import table_capacity
from infinite_llm.distributed.mesh import make_mesh, row_mesh
from infinite_llm.engine import programs
from infinite_llm.engine.group_inputs import fill_payloads, shift_of
from infinite_llm.scheduler.effects import Move
from pallas_kernels.pool_layout import held_dtype
from tests.testing import random_bits

I, N, Q, L, K, P, D = 4, 8, 2, 3, 2, 8, 4
EPOCH = 70


def tag_of(instance: int, block: int) -> int:
  """Tag of what every rBlock holds at first."""
  return 1000 * (instance + 1) + block


def move(src, dst, **changed) -> Move:
  """Sends rBlock `src` to `dst`, both `(instance, block)`."""
  values = {
    "uid": 7,
    "logical_id": 0,
    "src_instance": src[0],
    "src_block": src[1],
    "src_tag": tag_of(*src),
    "dst_instance": dst[0],
    "dst_block": dst[1],
    "dst_epoch": EPOCH + dst[1],
    "dst_tag": 5000 + tag_of(*src),
  }
  return Move(**values | changed)


class Devices:
  """Pools of four instances, as numpy arrays with a leading instance axis.

  Attributes:
    kv: `[I, N, L, 2, K, P, D]` random bits, as unsigned integers: bytes are
      compared, and among the numbers are NaNs of all kinds.
    tag: `[I, N]` uint32.
    epoch: `[I, N]` uint32; `grant` sets it.
  """

  def __init__(self, dtype, verify):
    self.mesh = make_mesh(I, 1)
    self._dtype = held_dtype(dtype)
    self._verify = verify
    rows = [row_mesh(self.mesh, i) for i in range(I)]
    self._place = lambda trees: place_rows(trees, self.mesh, rows)
    self._programs = {
      shift: programs.build_exchange(self.mesh, shift, verify=verify)
      for shift in range(1, I)
    }
    self.reset()

  def reset(self):
    self.kv = random_bits((I, N, L, 2, K, P, D), self._dtype)
    self.tag = np.asarray(
      [[tag_of(i, b) for b in range(N)] for i in range(I)], np.uint32
    )
    self.tag[:, 0] = 0
    self.epoch = np.zeros((I, N), np.uint32)

  def grant(self, *places):
    """Lets rBlocks be received, each under the epoch that `move` names."""
    for instance, block in places:
      self.epoch[instance, block] = EPOCH + block
      self.tag[instance, block] = 0

  def exchange(self, moves, shifts=None):
    """Runs one exchange; returns the moves that had to wait.

    Args:
      moves: What is to be sent.
      shifts: Which run; None is those that the moves need.
    """
    if shifts is None:
      shifts = sorted({shift_of(m, I) for m in moves})
    parts = {
      shift: [
        [m for m in moves if m.src_instance == i and shift_of(m, I) == shift][
          :Q
        ]
        for i in range(I)
      ]
      for shift in shifts
    }
    sent = {m for part in parts.values() for mine in part for m in mine}
    waiting = [m for m in moves if m not in sent]
    entries = np.zeros((I * table_capacity(N),), np.int32)
    arrays = (
      self.kv.view(self._dtype).reshape(I * N, *self.kv.shape[2:]),
      self.tag.reshape(-1),
      self.epoch.reshape(-1),
      entries,
      entries,
    )
    pool = PoolArrays(
      *(
        jax.device_put(x, NamedSharding(self.mesh, spec))
        for x, spec in zip(arrays, POOL_SPECS, strict=True)
      )
    )
    for shift in shifts:
      placed = self._place([fill_payloads(mine, Q) for mine in parts[shift]])
      pool, arrivals = self._programs[shift](pool, placed)
      assert (arrivals is not None) == self._verify
      if arrivals is not None:
        np.testing.assert_array_equal(
          np.where(arrivals.is_accepted, arrivals.sent, 0),
          np.where(arrivals.is_accepted, arrivals.found, 0),
        )
    assert not np.asarray(pool.block_ids).any()
    np.testing.assert_array_equal(pool.epoch, self.epoch.reshape(-1))
    kv = np.array(pool.kv).reshape(self.kv.shape)
    self.kv = kv.view(self.kv.dtype)
    self.tag = np.array(pool.tag).reshape(I, N)
    return waiting


KINDS = [
  ("float32", False),
  ("bfloat16", False),
  ("float8_e4m3fn", False),
  ("bfloat16", True),
]


@pytest.fixture(
  scope="module",
  name="shared",
  params=KINDS,
  ids=lambda kind: kind[0] + "_verified" * kind[1],
)
def _shared(request):
  return Devices(*request.param)


@pytest.fixture(name="devices")
def _devices(shared):
  shared.reset()
  return shared


def expect(devices, kv, tag, *accepted):
  """Pools are as before, but for what arrived."""
  for m in accepted:
    src, dst = (m.src_instance, m.src_block), (m.dst_instance, m.dst_block)
    kv[dst] = kv[src]
    tag[dst] = m.dst_tag
  np.testing.assert_array_equal(devices.kv, kv)
  np.testing.assert_array_equal(devices.tag, tag)


def test_payloads_of_several_shifts_arrive_at_once(devices):
  moves = [
    move((0, 3), (1, 5)),
    move((0, 4), (1, 2)),
    move((0, 5), (2, 6)),
    move((3, 1), (0, 7)),
    move((2, 1), (1, 7)),
    move((1, 1), (3, 3)),
  ]
  devices.grant(*((m.dst_instance, m.dst_block) for m in moves))
  kv, tag = devices.kv.copy(), devices.tag.copy()

  assert devices.exchange(moves) == []

  expect(devices, kv, tag, *moves)


def test_an_rblock_under_another_epoch_is_not_written(devices):
  devices.grant((1, 5), (1, 6))
  late = move((0, 3), (1, 5), dst_epoch=EPOCH + 4)
  never_granted = move((0, 4), (2, 6))
  good = move((0, 5), (1, 6))
  kv, tag = devices.kv.copy(), devices.tag.copy()

  devices.exchange([late, never_granted, good])

  expect(devices, kv, tag, good)


def test_epoch_zero_opens_nothing(devices):
  kv, tag = devices.kv.copy(), devices.tag.copy()
  devices.exchange([move((0, 3), (1, 5), dst_epoch=0)])
  expect(devices, kv, tag)


def test_a_source_that_holds_something_else_is_not_sent(devices):
  devices.grant((1, 5), (1, 6))
  wrong = move((0, 3), (1, 5), src_tag=tag_of(0, 4))
  good = move((0, 5), (1, 6))
  kv, tag = devices.kv.copy(), devices.tag.copy()

  devices.exchange([wrong, good])

  expect(devices, kv, tag, good)
  assert devices.tag[1, 5] == 0


def test_a_source_without_content_proves_nothing(devices):
  devices.grant((1, 5))
  devices.tag[0, 3] = 0
  kv, tag = devices.kv.copy(), devices.tag.copy()
  devices.exchange([move((0, 3), (1, 5), src_tag=0, dst_tag=0)])
  expect(devices, kv, tag)


def test_padding_reaches_no_null_block(devices):
  """Whatever a null block claims to hold or to accept."""
  devices.tag[:, 0] = 9
  devices.epoch[:, 0] = 9
  kv, tag = devices.kv.copy(), devices.tag.copy()
  devices.exchange([], shifts=range(1, I))
  expect(devices, kv, tag)


def test_a_repeated_payload_leaves_the_copy_as_it_is(devices):
  again = move((0, 3), (1, 5))
  devices.grant((1, 5))
  devices.exchange([again])
  # Its source belongs to somebody else by now.
  devices.kv[0, 3] ^= 1
  devices.tag[0, 3] = 77
  kv, tag = devices.kv.copy(), devices.tag.copy()

  devices.exchange([again])

  expect(devices, kv, tag)


def test_what_goes_by_a_shift_that_does_not_run_waits_in_order(devices):
  near = [move((0, 3), (1, 5)), move((0, 5), (1, 6))]
  far = move((0, 4), (2, 6))
  devices.grant((1, 5), (1, 6), (2, 6))
  kv, tag = devices.kv.copy(), devices.tag.copy()

  waiting = devices.exchange([near[0], far, near[1]], shifts=[2])

  assert waiting == near
  expect(devices, kv, tag, far)


def test_what_is_over_a_pairs_quota_waits_in_order(devices):
  places = [(1, block) for block in range(1, 6)]
  devices.grant(*places, (2, 4))
  moves = [move((0, 3), place) for place in places]
  elsewhere = move((0, 4), (2, 4))
  kv, tag = devices.kv.copy(), devices.tag.copy()

  waiting = devices.exchange([*moves, elsewhere])

  assert waiting == moves[2:]
  expect(devices, kv, tag, *moves[:2], elsewhere)


def test_granting_forgets_what_lay_there(devices):
  mesh = row_mesh(devices.mesh, 0)
  kv = devices.kv[0].astype(np.float32)
  arrays = (kv, devices.tag[0], devices.epoch[0])
  entries = jnp.zeros((table_capacity(N),), jnp.int32)
  pool = PoolArrays(*map(jnp.asarray, arrays), entries, entries.copy())
  block_ids = np.asarray([3, 5, 0, 0], np.int32)
  epochs = np.asarray([8, 9, 7, 7], np.uint32)
  granted = place_rows([(block_ids, epochs)], mesh, [mesh])

  pool = programs.build_grant(mesh)(pool, granted)

  assert pool.epoch.tolist() == [0, 0, 0, 8, 0, 9, 0, 0]
  want = devices.tag[0].copy()
  want[[0, 3, 5]] = 0
  assert pool.tag.tolist() == want.tolist()
