"""rBlocks that go to host memory and come back are what they were."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinite_llm.cache import host_pool as host_pool_module
from infinite_llm.cache import tier_moves
from infinite_llm.cache.host_pool import HostPool
from infinite_llm.cache.kv_pool import KVPool
from infinite_llm.distributed.mesh import make_mesh, row_mesh
from infinite_llm.engine.program_cache import ProgramCache
from infinite_llm.errors import InvariantError
from infinite_llm.types import Tier
from tests.testing import random_bits

N, H, L, K, P, D = 24, 12, 2, 2, 8, 4
BATCH = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
  src_block: int
  src_tag: int
  dst_block: int
  dst_tag: int


def leave(src: int, dst: int, **changed) -> Move:
  """HBM `src` to HOST `dst`; an rBlock in HBM has tag 100 + its number."""
  values = {
    "src_block": src,
    "src_tag": 100 + src,
    "dst_block": dst,
    "dst_tag": 1000 + src,
  }
  return Move(**values | changed)


def enter(was: int, src: int, dst: int, **changed) -> Move:
  """HOST `src`, which left HBM as `was`, to HBM `dst`."""
  values = {
    "src_block": src,
    "src_tag": 1000 + was,
    "dst_block": dst,
    "dst_tag": 2000 + was,
  }
  return Move(**values | changed)


class Tiers:
  """Both tiers of an instance, filled with random bits.

  Attributes:
    kv: `[N, L, 2, K, P, D]` what lies in HBM, as unsigned integers; `check`
      compares.
    tag: `[N]` the same of tags.
  """

  def __init__(self, tensor_parallel=1, dtype=np.float32, verify=True):
    mesh = make_mesh(1, tensor_parallel)
    self.pools = KVPool(
      mesh,
      [row_mesh(mesh, 0)],
      num_blocks=N,
      num_layers=L,
      num_kv_heads=K,
      block_size=P,
      head_dim=D,
      dtype=dtype,
    )
    self.steps = []
    self.host = HostPool(
      self.pools.row(0),
      row_mesh(mesh, 0),
      name=0,
      num_blocks=H,
      run=ProgramCache().run,
      batch_blocks=BATCH,
      verify=verify,
      progress=lambda done, total: self.steps.append((done, total)),
    )
    self._seeds = itertools.count()
    self.fill()

  def fill(self):
    """Puts new content into all of HBM."""
    pool = self.pools.row(0)
    self.kv = random_bits(pool.kv.shape, pool.kv.dtype, next(self._seeds))
    self.tag = np.arange(100, 100 + N, dtype=np.uint32)
    self.pools.set_row(
      0,
      pool._replace(
        kv=jax.device_put(self.kv.view(pool.kv.dtype), pool.kv.sharding),
        tag=jax.device_put(self.tag, pool.tag.sharding),
      ),
    )

  def advance(self):
    self.pools.set_row(0, self.host.advance(self.pools.row(0)))

  def drain(self):
    self.pools.set_row(0, self.host.drain(self.pools.row(0)))

  def run(self, to_tier, *moves):
    copy = self.host.copy(to_tier, moves)
    self.drain()
    assert copy.is_done

  def arrived(self, *moves):
    """Has `check` expect rBlocks in HBM that left it as they were filled."""
    for move in moves:
      was = move.dst_tag - 2000
      self.kv[move.dst_block] = self.left[was]
      self.tag[move.dst_block] = move.dst_tag

  def bits(self, kv):
    return np.asarray(kv).view(self.kv.dtype)

  def check(self):
    pool = self.pools.row(0)
    np.testing.assert_array_equal(self.bits(pool.kv), self.kv)
    np.testing.assert_array_equal(pool.tag, self.tag)


_SHARED = {}


@pytest.fixture(name="tiers", params=[1, 2], ids=["tensor1", "tensor2"])
def _tiers(request):
  if request.param not in _SHARED:
    _SHARED[request.param] = Tiers(request.param)
  tiers = _SHARED[request.param]
  tiers.drain()
  tiers.fill()
  tiers.left = tiers.kv.copy()
  return tiers


def test_all_of_it_is_allocated_at_once_with_progress():
  tiers = Tiers()
  assert tiers.steps == [(3, 11), (6, 11), (9, 11), (11, 11)]
  for block_id in range(1, H):
    kv, tag = tiers.host.read(block_id)
    assert not kv.any()
    assert tag == 0


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1, H - 1])
def test_what_leaves_lies_in_host_memory_bit_for_bit(tiers, count):
  moves = [leave(2 * i + 1, H - 1 - i) for i in range(count)]

  tiers.run(Tier.HOST, *moves)

  tiers.check()
  for move in moves:
    kv, tag = tiers.host.read(move.dst_block)
    np.testing.assert_array_equal(tiers.bits(kv), tiers.left[move.src_block])
    assert tag == move.dst_tag


def test_random_lists_come_back_bit_for_bit_again_and_again(tiers):
  rng = np.random.default_rng(1)
  for _ in range(6):
    count = int(rng.integers(1, H))
    src = rng.choice(np.arange(1, N), count, replace=False).tolist()
    host = rng.choice(np.arange(1, H), count, replace=False).tolist()
    dst = rng.choice(np.arange(1, N), count, replace=False).tolist()
    tiers.fill()
    tiers.left = tiers.kv.copy()
    tiers.run(Tier.HOST, *map(leave, src, host))
    back = list(map(enter, src, host, dst))

    tiers.run(Tier.HBM, *back)

    tiers.arrived(*back)
    tiers.check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_narrow_numbers_come_back_bit_for_bit(dtype):
  tiers = Tiers(tensor_parallel=2, dtype=np.dtype(dtype))
  tiers.left = tiers.kv.copy()
  tiers.run(Tier.HOST, leave(3, 4), leave(5, 1))
  for src, host in ((3, 4), (5, 1)):
    kv, _ = tiers.host.read(host)
    np.testing.assert_array_equal(tiers.bits(kv), tiers.left[src])
  back = [enter(3, 4, 9), enter(5, 1, 3)]

  tiers.run(Tier.HBM, *back)

  tiers.arrived(*back)
  tiers.check()


def test_copies_in_both_directions_go_on_beside_each_other(tiers):
  tiers.run(Tier.HOST, *(leave(i, i) for i in range(1, 6)))
  back = [enter(i, i, 10 + i) for i in range(1, 6)]
  entering = tiers.host.copy(Tier.HBM, back)
  leaving = tiers.host.copy(Tier.HOST, [leave(i, i) for i in range(6, 10)])

  tiers.drain()

  assert entering.is_done
  assert leaving.is_done
  tiers.arrived(*back)
  tiers.check()
  for i in range(6, 10):
    kv, _ = tiers.host.read(i)
    np.testing.assert_array_equal(tiers.bits(kv), tiers.left[i])


def test_small_copies_share_a_batch_and_end_in_order(tiers):
  moved = tiers.host.num_moved[Tier.HOST]
  copies = [tiers.host.copy(Tier.HOST, [leave(i, i)]) for i in range(1, 5)]
  done = []
  while not tiers.host.is_idle:
    tiers.advance()
    done.append([copy.is_done for copy in copies])
  assert done[-1] == [True] * 4
  assert all(flags == sorted(flags, reverse=True) for flags in done)
  assert tiers.host.num_moved[Tier.HOST] == moved + 4


def test_a_copy_of_nothing_is_done(tiers):
  assert tiers.host.copy(Tier.HOST, []).is_done
  assert tiers.host.is_idle


def test_only_so_many_batches_are_under_way(tiers, monkeypatch):
  monkeypatch.setattr(host_pool_module, "BATCHES_UNDER_WAY", 2)
  monkeypatch.setattr(host_pool_module._Batch, "is_over", lambda _: False)
  moves = [leave(i, i, dst_tag=5000 + i) for i in range(1, 11)]
  copy = tiers.host.copy(Tier.HOST, moves)
  for _ in range(3):
    tiers.advance()
  tags = np.asarray(tiers.host._tag)
  has_begun = [tags[i] == 5000 + i for i in range(1, 11)]
  assert has_begun == [True] * 2 * BATCH + [False] * (10 - 2 * BATCH)
  assert not copy.is_done
  monkeypatch.undo()
  tiers.drain()
  assert copy.is_done
  assert tiers.host.read(10)[1] == 5010


def test_a_step_begins_one_batch_each_way(tiers, monkeypatch):
  tiers.run(Tier.HOST, *(leave(i, i) for i in range(1, 7)))
  monkeypatch.setattr(host_pool_module._Batch, "is_over", lambda _: False)
  tiers.host.copy(Tier.HOST, [leave(i, i) for i in range(7, 12)])
  back = [enter(i, i, 12 + i) for i in range(1, 7)]
  tiers.host.copy(Tier.HBM, back)
  for begun in (1, 2):
    tiers.advance()
    under_way = tiers.host._under_way
    assert {tier: len(under_way[tier]) for tier in Tier} == dict.fromkeys(
      Tier, begun
    )
  monkeypatch.undo()
  tiers.drain()
  tiers.arrived(*back)
  tiers.check()


def test_a_failure_does_not_lose_a_pool_that_rblocks_entered(monkeypatch):
  tiers = Tiers()
  tiers.left = tiers.kv.copy()
  tiers.run(Tier.HOST, *(leave(i, i) for i in range(1, 10)))
  back = [enter(i, i, 12 + i) for i in range(1, 10)]
  copy = tiers.host.copy(Tier.HBM, back)
  with monkeypatch.context() as patch:
    patch.setattr(host_pool_module._Batch, "is_over", lambda _: False)
    tiers.advance()
  device_put = jax.device_put

  def put(x, where, **options):
    if isinstance(x, list):
      raise RuntimeError("no room on the link")
    return device_put(x, where, **options)

  monkeypatch.setattr(jax, "device_put", put)
  # The first batch is there, and would end; the second cannot begin.
  for _ in range(2):
    with pytest.raises(RuntimeError, match="no room on the link"):
      tiers.advance()
  monkeypatch.undo()
  tiers.drain()
  assert copy.is_done
  tiers.arrived(*back)
  tiers.check()


def test_what_enters_is_not_in_the_pool_before_it_is_done(tiers, monkeypatch):
  """No program in HBM waits for the link: it is launched when all is there."""
  tiers.run(Tier.HOST, leave(3, 4))
  monkeypatch.setattr(host_pool_module._Batch, "is_over", lambda _: False)
  copy = tiers.host.copy(Tier.HBM, [enter(3, 4, 7)])
  tiers.advance()
  tiers.check()
  assert not copy.is_done
  monkeypatch.undo()
  tiers.drain()
  tiers.arrived(enter(3, 4, 7))
  tiers.check()


def test_a_source_in_hbm_that_holds_something_else_proves_nothing(tiers):
  tiers.run(Tier.HOST, leave(3, 4, src_tag=999), leave(5, 6))
  assert tiers.host.read(4)[1] == 0
  assert tiers.host.read(6)[1] == 1005
  # Nor does it when it comes back, whatever the books say.
  tiers.run(Tier.HBM, enter(3, 4, 8), enter(5, 6, 9))
  tiers.tag[8] = 0
  tiers.arrived(enter(5, 6, 9))
  tiers.check()


def test_a_source_in_host_memory_that_holds_something_else_is_not_read(tiers):
  tiers.run(Tier.HOST, leave(3, 4))
  tiers.run(Tier.HBM, enter(5, 4, 8))
  tiers.tag[8] = 0
  tiers.check()


def test_an_old_copy_is_replaced(tiers):
  tiers.run(Tier.HOST, leave(3, 4))
  tiers.run(Tier.HOST, leave(5, 4))
  kv, tag = tiers.host.read(4)
  np.testing.assert_array_equal(tiers.bits(kv), tiers.left[5])
  assert tag == 1005


def test_a_source_may_be_overwritten_once_it_left(tiers):
  """Whatever the link has done by then: it was packed before."""
  tiers.run(Tier.HOST, leave(3, 4))
  back = enter(3, 4, 5)
  entering = tiers.host.copy(Tier.HBM, [back])
  tiers.advance()
  leaving = tiers.host.copy(Tier.HOST, [leave(6, 7)])
  tiers.drain()
  assert entering.is_done
  assert leaving.is_done
  tiers.arrived(back)
  tiers.check()


@pytest.mark.parametrize("to_tier", list(Tier))
def test_a_move_that_changes_content_is_found(monkeypatch, to_tier):
  tiers = Tiers(tensor_parallel=2)
  if to_tier is Tier.HBM:
    tiers.run(Tier.HOST, leave(3, 4))
  device_put = jax.device_put

  def put(x, where, **options):
    out = device_put(x, where, **options)
    if isinstance(x, list):
      # The link turns one bit on the way.
      kv = np.array(out[0])
      kv.reshape(-1).view(np.uint32)[-1] ^= 1
      out[0] = device_put(kv, where)
    return out

  monkeypatch.setattr(jax, "device_put", put)
  move = leave(3, 4) if to_tier is Tier.HOST else enter(3, 4, 7)
  with pytest.raises(
    InvariantError, match=f"to {to_tier.name} changed an rBlock.*rank 1"
  ):
    tiers.run(to_tier, move)


@pytest.mark.parametrize("axis", range(1, 6))
@pytest.mark.parametrize("to_tier", list(Tier))
def test_rblocks_that_a_program_turns_round_are_found(
  monkeypatch, to_tier, axis
):
  pack, unpack = tier_moves.pack_blocks, tier_moves.unpack_blocks
  with monkeypatch.context() as patch:
    if to_tier is Tier.HOST:
      patch.setattr(
        tier_moves, "pack_blocks", lambda kv, ids: jnp.flip(pack(kv, ids), axis)
      )
    else:
      patch.setattr(
        tier_moves,
        "unpack_blocks",
        lambda kv, blocks, *at: unpack(kv, jnp.flip(blocks, axis), *at),
      )
    tiers = Tiers()
    there = tiers.host.copy(Tier.HOST, [leave(3, 4)])
    with pytest.raises(
      InvariantError, match=rf"to {to_tier.name} changed an rBlock"
    ):
      tiers.drain()
      assert there.is_done
      tiers.run(Tier.HBM, enter(3, 4, 7))


@pytest.mark.parametrize("to_tier", list(Tier))
def test_a_transfer_that_cannot_be_launched_waits_again(monkeypatch, to_tier):
  tiers = Tiers()
  tiers.left = tiers.kv.copy()
  moves = [leave(3, 4), leave(5, 6)]
  back = [enter(3, 4, 9), enter(5, 6, 3)]
  if to_tier is Tier.HBM:
    tiers.run(Tier.HOST, *moves)
  device_put = jax.device_put

  def put(x, where, **options):
    if isinstance(x, list):
      raise RuntimeError("no room on the link")
    return device_put(x, where, **options)

  monkeypatch.setattr(jax, "device_put", put)
  copy = tiers.host.copy(to_tier, moves if to_tier is Tier.HOST else back)
  with pytest.raises(RuntimeError, match="no room on the link"):
    tiers.drain()
  assert not copy.is_done
  monkeypatch.undo()
  tiers.drain()
  assert copy.is_done
  if to_tier is Tier.HOST:
    tiers.run(Tier.HBM, *back)
  tiers.arrived(*back)
  tiers.check()


def test_unverified_moves_are_the_same():
  tiers = Tiers(verify=False)
  tiers.left = tiers.kv.copy()
  tiers.run(Tier.HOST, leave(3, 4), leave(5, 6))
  back = [enter(3, 4, 9), enter(5, 6, 3)]
  tiers.run(Tier.HBM, *back)
  tiers.arrived(*back)
  tiers.check()
