"""Where moves are verified, no exchange changes an rBlock unnoticed."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from infinite_llm.cache import movement
from infinite_llm.cache.block_pool import BlockPool
from infinite_llm.cache.kv_pool import POOL_SPECS, PoolArrays
from infinite_llm.cache.movement import ARRIVAL_SPEC, Arrivals
from infinite_llm.cache.packed_rows import place_rows
from infinite_llm.cache.rows import split_fields
from infinite_llm.distributed.mesh import make_mesh, row_mesh
from infinite_llm.engine import programs, warm_up
from infinite_llm.engine.arrival_check import check_arrivals
from infinite_llm.engine.group_inputs import empty_payloads, fill_payloads
from infinite_llm.errors import InvariantError
from infinite_llm.models.hf_loader import load_hf
from infinite_llm.types import TENSOR_AXIS
from pallas_kernels.pool_layout import held_dtype
from tests.engine.host_tier_test import build, check, prompt_of, sampling_of
from tests.testing import (
  SamplingOracle,
  drain,
  move,
  random_bits,
  write_shallow_checkpoint,
)

I, T, N, Q, L, K, P, D = 2, 2, 8, 2, 2, 4, 8, 4
UID = 7


def flip(kv):
  """One bit of one number, which is of the last tensor rank's part."""
  size = f"uint{8 * kv.dtype.itemsize}"
  bits = kv.view(size)
  num_ranks = jax.lax.axis_size(TENSOR_AXIS)
  is_last = jax.lax.axis_index(TENSOR_AXIS) == num_ranks - 1
  last = (-1,) * kv.ndim
  bits = bits.at[last].set(bits[last] ^ is_last.astype(size))
  return bits.view(kv.dtype)


CHANGES = {
  "a bit is another": flip,
  "K and V change places": lambda kv: kv[:, :, ::-1],
  "layers are reversed": lambda kv: kv[:, ::-1],
  "heads are reversed": lambda kv: kv[:, :, :, ::-1],
  "tokens are reversed": lambda kv: kv[:, :, :, :, ::-1],
  "dims are reversed": lambda kv: kv[..., ::-1],
  "rBlocks change places": lambda kv: kv[::-1],
}


def break_pack(monkeypatch, change):
  pack = movement.pack_blocks
  monkeypatch.setattr(
    movement, "pack_blocks", lambda kv, ids: change(pack(kv, ids))
  )


def break_unpack(monkeypatch, change):
  unpack = movement.unpack_blocks
  monkeypatch.setattr(
    movement,
    "unpack_blocks",
    lambda kv, blocks, *where: unpack(kv, change(blocks), *where),
  )


def break_link(monkeypatch, change):
  permute = jax.lax.ppermute

  def changed(tree, axis, perm):
    blocks, labels = permute(tree, axis, perm)
    return change(blocks), labels

  monkeypatch.setattr(jax.lax, "ppermute", changed)


def books() -> list[BlockPool]:
  """In which every rBlock is a request's."""
  pools = [BlockPool(instance, N) for instance in range(I)]
  for pool in pools:
    pool.allocate(N - 1, UID)
  return pools


def arrivals_of(moves, dtype, epochs) -> list[Arrivals]:
  """Exchanges random rBlocks, all of them proved.

  Args:
    moves: At most Q from each instance.
    dtype: Of the pool.
    epochs: `[I, N]` under which rBlocks are granted.
  """
  mesh = make_mesh(I, T)
  rows = [row_mesh(mesh, instance) for instance in range(I)]
  dtype = held_dtype(dtype)
  arrays = PoolArrays(
    kv=random_bits((I * N, L, 2, K, P, D), dtype).view(dtype),
    tag=np.ones(I * N, np.uint32),
    epoch=np.asarray(epochs, np.uint32).reshape(-1),
    block_ids=np.zeros(I, np.int32),
    logical_ids=np.zeros(I, np.int32),
  )
  pool = jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
    arrays,
    POOL_SPECS,
  )
  payloads = []
  for instance in range(I):
    mine = [each for each in moves if each.src_instance == instance]
    payloads.append(fill_payloads(mine, Q) if mine else empty_payloads(Q))
    payloads[-1].src_tag[:] = 1
  exchange = programs.build_exchange(mesh, 1, verify=True)
  _, arrivals = exchange(pool, place_rows(payloads, mesh, rows))
  return [Arrivals(*row) for row in split_fields(arrivals, rows, ARRIVAL_SPEC)]


def two_moves():
  """Both to instance 1, to its rBlocks 3 and 4, and the epochs there."""
  moves = [
    dataclasses.replace(move(0, 1, number), dst_block=number + 2)
    for number in (1, 2)
  ]
  epochs = np.zeros((I, N))
  for each in moves:
    epochs[1, each.dst_block] = each.dst_epoch
  return moves, epochs


DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_arrives_as_it_was_sent_is_right(dtype):
  moves, epochs = two_moves()
  arrivals = arrivals_of(moves, dtype, epochs)
  check_arrivals(arrivals, books())
  _, there = arrivals
  assert there.is_accepted.shape == (1, T, Q)
  assert np.asarray(there.is_accepted).all()
  sums = np.asarray(there.sent)
  assert len(set(sums.reshape(-1).tolist())) == T * Q


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", [break_pack, break_link, break_unpack])
def test_what_changes_on_its_way_is_found(monkeypatch, where, change):
  where(monkeypatch, CHANGES[change])
  moves, epochs = two_moves()
  arrivals = arrivals_of(moves, "float32", epochs)
  with pytest.raises(
    InvariantError, match=rf"instance 1 received rBlock .*request {UID} of"
  ) as raised:
    check_arrivals(arrivals, books())
  if change == "a bit is another":  # In the last rBlock of all.
    assert f"rBlock {moves[1].dst_block} (" in str(raised.value)
    assert "on tensor rank 1" in str(raised.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_is_found_in_any_dtype(monkeypatch, dtype):
  break_unpack(monkeypatch, flip)
  moves, epochs = two_moves()
  arrivals = arrivals_of(moves, dtype, epochs)
  _, there = arrivals
  differs = np.asarray(there.sent) != np.asarray(there.found)
  assert differs.tolist() == [[[False, False], [False, True]]]
  with pytest.raises(InvariantError, match="received rBlock 4 "):
    check_arrivals(arrivals, books())


def test_a_program_that_writes_elsewhere_is_found(monkeypatch):
  unpack = movement.unpack_blocks
  monkeypatch.setattr(
    movement,
    "unpack_blocks",
    lambda kv, blocks, ids, valid: unpack(kv, blocks, ids + 2, valid),
  )
  moves, epochs = two_moves()
  with pytest.raises(InvariantError, match="instance 1 received rBlock 3 "):
    check_arrivals(arrivals_of(moves, "float32", epochs), books())


def test_what_was_refused_is_not_compared(monkeypatch):
  break_link(monkeypatch, flip)
  moves, _ = two_moves()
  arrivals = arrivals_of(moves, "float32", np.zeros((I, N)))
  check_arrivals(arrivals, books())


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
  return write_shallow_checkpoint(tmp_path_factory.mktemp("arrivals"))


def lenders(checkpoint, tensor_parallel):
  """Two instances of two tensor ranks, each with room for 128 tokens."""
  model = load_hf(checkpoint, make_mesh(2, tensor_parallel), dtype="float32")
  return build(
    model,
    num_instances=2,
    tensor_parallel=tensor_parallel,
    policy="borrow",
    host_blocks=0,
  )


def test_engines_verify_what_they_lend_by_programs_of_the_warm_up(
  checkpoint, monkeypatch
):
  jobs = warm_up._jobs
  monkeypatch.setattr(
    warm_up,
    "_jobs",
    lambda *args: [job for job in jobs(*args) if "exchange" in job[0]],
  )
  engine = lenders(checkpoint, 1)
  warm_up.warm_up(engine.runner, (), engine.config)
  compiled = set(engine.runner.programs)
  assert compiled == {("exchange", 1, 1), ("exchange", 1, 4)}
  sampling = sampling_of(20)
  name = engine.add_request(prompt_of(150), sampling, instance=0)
  dense = load_hf(checkpoint, make_mesh(1, 1), dtype="float32").dense()
  check(SamplingOracle(dense, 256), drain(engine)[name], sampling)
  assert engine.group.num_blocks_moved > 0
  assert engine.runner.launches["exchange"] > 0
  late = set(engine.runner.programs) - compiled
  assert "exchange" not in {name for name, *_ in late}


@pytest.mark.parametrize("change", ["a bit is another", "tokens are reversed"])
def test_an_engine_says_which_rblock_an_exchange_changed(
  checkpoint, monkeypatch, change
):
  break_link(monkeypatch, CHANGES[change])
  engine = lenders(checkpoint, 2)
  engine.add_request(prompt_of(150), sampling_of(20), instance=0)
  with pytest.raises(
    InvariantError,
    match=r"exchange changed an rBlock: instance 1 received rBlock \d+ .*"
    r"request \d+ of instance 0.* sent with checksum 0x\w+ and found with 0x",
  ):
    drain(engine)
