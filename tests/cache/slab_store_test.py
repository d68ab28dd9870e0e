"""Slabs hold what left HBM, and it comes back as it was, bit for bit."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from infinite_llm.cache import host_slabs, slab_store, tier_moves
from infinite_llm.cache.kv_pool import POOL_SPECS, KVPool
from infinite_llm.cache.slab_store import SlabStore
from infinite_llm.distributed.mesh import make_mesh, row_mesh
from infinite_llm.engine.program_cache import ProgramCache
from infinite_llm.errors import InvariantError
from tests.testing import random_bits

N, S, L, K, P, D = 12, 3, 3, 2, 8, 4
UID = 7
DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
BLOCKS = ((3, 9, 1), (5, 2, 11), (4, 8, 6))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
  src_block: int
  src_tag: int
  dst_block: int
  dst_tag: int


class Slabs:
  """Slabs of a request, of a pool full of random bits.

  Attributes:
    bits: `[N, L, 2, K, P, D]` what lies in HBM, as unsigned integers.
    store: Holds the slabs.
    programs: What it ran.
  """

  def __init__(self, dtype="float32", tensor_parallel=1, verify=True):
    mesh = make_mesh(1, tensor_parallel)
    self._pools = KVPool(
      mesh,
      [row_mesh(mesh, 0)],
      num_blocks=N,
      num_layers=L,
      num_kv_heads=K,
      block_size=P,
      head_dim=D,
      dtype=dtype,
    )
    pool = self._pools.row(0)
    self.bits = random_bits(pool.kv.shape, pool.kv.dtype)
    self.hbm = NamedSharding(row_mesh(mesh, 0), POOL_SPECS.kv)
    self._pool = pool._replace(
      kv=jax.device_put(self.bits.view(pool.kv.dtype), pool.kv.sharding),
      tag=jax.device_put(
        np.arange(100, 100 + N, dtype="u4"), pool.tag.sharding
      ),
    )
    self.programs = ProgramCache()
    self.store = SlabStore(
      row_mesh(mesh, 0),
      name=0,
      slab_blocks=S,
      run=self.programs.run,
      verify=verify,
    )

  def leave(self, blocks=BLOCKS):
    """Has slabs of these rBlocks leave, and holds them."""
    numbers = itertools.count(10)
    for ids in blocks:
      moves = [
        Move(src_block=b, src_tag=100 + b, dst_block=0, dst_tag=1000 + b)
        for b in ids
      ]
      logical_ids = [next(numbers) for _ in ids]
      leaving = self.store.leave(self._pool, UID, moves, logical_ids)
      jax.block_until_ready(leaving.slab.layers)
      self.store.keep(leaving)
    return self.store.slabs(UID)

  def stream(self, together=2):
    """Gives each layer's part of each slab, as bits, in order."""
    slabs = self.store.slabs(UID)
    stream = self.store.stream(slabs, together)
    for _ in range(L):
      for few in itertools.batched(slabs, together):
        parts = stream.take()
        assert len(parts) == len(few)
        yield [np.asarray(part).view(self.bits.dtype) for part in parts]
        stream.used(jnp.zeros(0))

  def check_stream(self, blocks=BLOCKS, together=2):
    came = itertools.chain.from_iterable(self.stream(together))
    for layer, ids in itertools.product(range(L), blocks):
      part = next(came)
      want = self.bits[[0, *ids], layer][:, None]
      np.testing.assert_array_equal(part, want)
    assert next(came, None) is None


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slabs_lie_in_host_memory_and_come_back_bit_for_bit(
  dtype, tensor_parallel, verify
):
  slabs = Slabs(dtype, tensor_parallel, verify)
  for slab, ids in zip(slabs.leave(), BLOCKS, strict=True):
    assert len(slab.layers) == L
    for layer, there in enumerate(slab.layers):
      assert there.sharding.memory_kind == "pinned_host"
      np.testing.assert_array_equal(
        np.asarray(there).view(slabs.bits.dtype),
        slabs.bits[[0, *ids], layer][:, None],
      )
    assert slab.tag.tolist() == [0, *(1000 + b for b in ids)]
    assert (slab.sums is not None) == verify
  slabs.check_stream()
  assert len(slabs.programs) == 1 + verify


def test_of_what_is_verified_every_part_that_comes_is_summed(monkeypatch):
  slabs = Slabs()
  slabs.leave()
  compared = []
  monkeypatch.setattr(
    slab_store.SlabSums,
    "compare",
    lambda self, layer, found, tier: compared.append((self.first, layer)),
  )
  slabs.check_stream(together=2)
  assert compared == [(n, x) for x in range(L) for n in (10, 13, 16)]


def test_warm_up_compiles_all_that_verifies():
  slabs = Slabs()
  nothing = slabs.store.warm_up(slabs._pool)
  (part,) = slabs.store.stream([nothing], 4).take()
  assert part.shape == (1 + S, 1, 2, K, P, D)
  slabs.programs.close_warm_up()
  slabs.leave()
  slabs.check_stream()
  assert slabs.programs.num_late_compiles == 0


def flip(part):
  bits = np.array(part)
  bits.view(f"u{bits.dtype.itemsize}").reshape(-1)[-1] ^= 1
  return bits


CHANGES = {
  "a bit is another": flip,
  "K and V change places": lambda part: np.asarray(part)[:, :, ::-1],
  "heads are reversed": lambda part: np.asarray(part)[:, :, :, ::-1],
  "tokens are reversed": lambda part: np.asarray(part)[:, :, :, :, ::-1],
  "dims are reversed": lambda part: np.asarray(part)[..., ::-1],
  "rBlocks change places": lambda part: np.asarray(part)[::-1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_on_its_way_to_hbm_is_found(monkeypatch, dtype, change):
  slabs = Slabs(dtype, tensor_parallel=2)
  slabs.leave()
  transfer, count = host_slabs.transfer, itertools.count()

  def changed(parts, sharding):
    """Layer 1 of the third slab, which comes alone, is changed."""
    parts = transfer(parts, sharding)
    if next(count) == 3:
      (part,) = parts
      parts = (jax.device_put(CHANGES[change](part), sharding),)
    return parts

  monkeypatch.setattr(host_slabs, "transfer", changed)
  came = slabs.stream()
  for _ in range(3):
    next(came)
  with pytest.raises(
    InvariantError,
    match=rf"Layer 1 of the slab of request {UID} from rBlock 16 on must arrive"
    r" as it left; .* to HBM: it left HBM with checksum 0x\w+ and has 0x\w+ on",
  ) as raised:
    next(came)
  if change == "a bit is another":
    assert str(raised.value).endswith("on tensor rank 1.")


def test_parts_that_come_in_another_order_are_found(monkeypatch):
  slabs = Slabs()
  slabs.leave()
  monkeypatch.setattr(
    slab_store, "in_order", lambda parts, n: host_slabs.in_order(parts[::-1], n)
  )
  with pytest.raises(InvariantError, match=r"Layer 0 of the slab .* to HBM"):
    next(slabs.stream())


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_on_its_way_to_host_is_found(monkeypatch, change):
  slabs = Slabs(tensor_parallel=2)
  device_put = jax.device_put

  def put(x, where, **options):
    out = device_put(x, where, **options)
    if isinstance(x, list):
      out[2] = device_put(CHANGES[change](out[2]), where)
    return out

  monkeypatch.setattr(jax, "device_put", put)
  with pytest.raises(
    InvariantError, match=f"Layer 2 of the slab of request {UID} .* to HOST"
  ):
    slabs.leave()


@pytest.mark.parametrize("axis", range(6))
def test_a_slab_that_is_packed_wrongly_is_found(monkeypatch, axis):
  pack = tier_moves.pack_blocks
  monkeypatch.setattr(
    tier_moves, "pack_blocks", lambda kv, ids: jnp.flip(pack(kv, ids), axis)
  )
  with pytest.raises(InvariantError, match=r"Layer 0 of the slab .* to HOST"):
    Slabs().leave()


def test_a_slab_that_nobody_verifies_comes_whatever_it_is():
  slabs = Slabs(verify=False)
  first, *_ = slabs.leave()
  assert first.sums is None
  assert slabs.store.stream([first], 1)._check is None
