"""Attention over HBM and host memory equals attention over all of it in HBM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from infinite_llm.attention.dist_attention import Window, local_attention
from infinite_llm.attention.host_attention import staged_attention
from infinite_llm.cache import global_arrays, host_slabs
from infinite_llm.cache.host_slabs import TABLE_SPECS, HostSlabs
from infinite_llm.cache.kv_pool import POOL_SPECS
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.errors import InvariantError
from pallas_kernels.attention_state import AttentionState, merge_many
from pallas_kernels.micro_attention.api import BlockTables, micro_attention
from tests.tolerances import lse_error, relative_error, tolerance

I, T, N, L, K, P, D, H, S = 2, 2, 20, 3, 2, 8, 16, 4, 4
SCALE = D**-0.5
HEADS = PartitionSpec(None, "tensor")
STATES = AttentionState(*[PartitionSpec("instance", None, "tensor")] * 2)


class Request:
  """One request of `length` tokens, spread over two instances and two tiers.

  Attributes:
    kv: `[I * N, L, 2, K, P, D]` pools.
    places: `(instance, block)` of each logical rBlock, while it is in HBM.
    host: Logical rBlocks that go to host memory.
  """

  def __init__(self, length, num_queries, host):
    rng = np.random.default_rng(0)
    self.mesh = make_mesh(I, T)
    self.kv = rng.standard_normal((I * N, L, 2, K, P, D), dtype=np.float32)
    blocks = [list(rng.permutation(np.arange(1, N))) for _ in range(I)]
    count = -(-length // P)
    holders = rng.integers(0, I, count)
    self.places = [(int(i), int(blocks[i].pop())) for i in holders]
    self.host = set(host)
    self.q = rng.standard_normal((L, num_queries, H, D), dtype=np.float32)
    self.positions = np.arange(length - num_queries, length, dtype=np.int32)
    self.placed = jax.device_put(
      self.kv, NamedSharding(self.mesh, POOL_SPECS.kv)
    )

  def at(self, instance, *, in_host):
    """`(block, logical)` of the rBlocks of one tier of an instance."""
    return [
      (block, n)
      for n, (holder, block) in enumerate(self.places)
      if holder == instance and (n in self.host) == in_host
    ]

  def slabs(self) -> HostSlabs:
    """Those that go to host memory, `S` of each instance at a time."""
    slabs = HostSlabs(self.mesh, S)
    parts = [self.at(i, in_host=True) for i in range(I)]
    for begin in range(0, max(map(len, parts)), S):
      now = [part[begin : begin + S] for part in parts]
      slabs.push(
        self.placed,
        [[block for block, _ in part] for part in now],
        [[logical for _, logical in part] for part in now],
      )
    return slabs

  def in_hbm(self) -> BlockTables:
    """Tables of both instances over what stays, one row each."""
    tables = []
    for instance in range(I):
      entries = np.zeros((2, N), np.int32)
      here = self.at(instance, in_host=False)
      entries[:, : len(here)] = np.asarray(here, np.int32).reshape(-1, 2).T
      count = np.asarray([len(here)], np.int32)
      tables.append(BlockTables(*entries, np.zeros(1, np.int32), count))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *tables)

  def expected(self, layer, window) -> AttentionState:
    logical = np.arange(len(self.places), dtype=np.int32)
    blocks = np.asarray([i * N + b for i, b in self.places], np.int32)
    ends = np.zeros(1, np.int32), np.asarray([len(blocks)], np.int32)
    return micro_attention(
      *map(jnp.asarray, (self.q[layer], [0, len(self.positions)])),
      jnp.asarray(self.positions),
      jnp.asarray(self.kv),
      layer,
      jax.tree.map(jnp.asarray, BlockTables(blocks, logical, *ends)),
      scale=SCALE,
      max_query_tokens=len(self.positions),
      sliding_window=window,
      implementation="reference",
    )

  def attend(self, slabs, window, most_staged=2) -> list[AttentionState]:
    """All layers one after the other, with the host's part streamed."""
    seen = Window(SCALE, window, len(self.positions))
    cu_seqlens = np.asarray([0, len(self.positions)], np.int32)

    def begin(q, positions, kv, tables, layer):
      state = local_attention(q, cu_seqlens, positions, kv, layer, tables, seen)
      return jax.tree.map(lambda x: x[None], state)

    def add(state, q, positions, staged, tables):
      state = jax.tree.map(lambda x: x[0], state)
      state = staged_attention(
        state, q, cu_seqlens, positions, staged, tables, seen
      )
      return jax.tree.map(lambda x: x[None], state)

    shard = functools.partial(
      jax.shard_map, mesh=self.mesh, out_specs=STATES, check_vma=False
    )
    none = PartitionSpec()
    add = jax.jit(
      shard(add, in_specs=(STATES, HEADS, none, POOL_SPECS.kv, TABLE_SPECS))
    )
    stream = slabs.stream(most_staged)
    states = []
    for layer in range(L):
      first = shard(
        functools.partial(begin, layer=layer),
        in_specs=(HEADS, none, POOL_SPECS.kv, TABLE_SPECS),
      )
      q = self.q[layer]
      state = jax.jit(first)(q, self.positions, self.placed, self.in_hbm())
      for slab in slabs.slabs:
        assert stream.num_staged <= most_staged
        (part,) = stream.take()
        assert part.is_ready()
        state = add(state, q, self.positions, part, slab.tables)
        stream.used(state)
      states.append(merge_many(state))
    with pytest.raises(InvariantError, match=r"All parts .* taken"):
      for _ in range(most_staged + 1):
        stream.take()
    return states


def check(request, states, window=None):
  allowed = tolerance("float32")
  for layer, state in enumerate(states):
    expected = request.expected(layer, window)
    assert relative_error(state.out, expected.out) < allowed.attention
    assert lse_error(state.lse, expected.lse) < allowed.lse


@pytest.mark.parametrize(
  ("num_queries", "window"), [(1, None), (1, 30), (13, None), (13, 30)]
)
def test_host_memory_takes_part_in_attention(num_queries, window):
  request = Request(101, num_queries, host=range(9))
  slabs = request.slabs()
  assert len(slabs) == 2
  check(request, request.attend(slabs, window), window)


@pytest.mark.parametrize("host", [range(13), range(1), []])
def test_all_or_nothing_may_lie_in_host_memory(host):
  request = Request(101, 1, host)
  check(request, request.attend(request.slabs(), None, most_staged=3))


def test_what_left_the_pools_is_not_read_there():
  request = Request(101, 1, host=range(9))
  slabs = request.slabs()
  gone = [
    i * N + b for n, (i, b) in enumerate(request.places) if n in request.host
  ]
  request.placed = jax.device_put(
    np.where(
      np.isin(np.arange(I * N), gone)[:, None, None, None, None, None],
      np.nan,
      request.kv,
    ),
    request.placed.sharding,
  )
  check(request, request.attend(slabs, None))


def test_a_slab_has_its_size():
  request = Request(40, 1, host=[])
  with pytest.raises(InvariantError, match=r"takes 4 rBlocks .*; got 5"):
    HostSlabs(request.mesh, S).push(
      request.placed, [[1, 2, 3, 4, 5], []], [[0, 1, 2, 3, 4], []]
    )


def test_one_part_at_a_time_is_no_stream():
  with pytest.raises(InvariantError, match=r"at least 2, .*; got 1"):
    HostSlabs(make_mesh(I, T), S).stream(1)


def test_what_comes_next_is_begun_before_a_part_is_handed_out(monkeypatch):
  """A transfer waits for the programs that are launched before it."""
  begun = []

  def transfer(parts, sharding):
    begun.append(parts)
    return global_arrays.transfer(parts, sharding)

  slabs = Request(101, 1, host=range(13)).slabs()
  monkeypatch.setattr(host_slabs, "transfer", transfer)
  num_parts = len(slabs) * L
  stream = slabs.stream(2)
  for num_taken in range(num_parts):
    stream.take()
    assert len(begun) == min(2 + num_taken, num_parts)
    stream.used(jnp.zeros(()).block_until_ready())
