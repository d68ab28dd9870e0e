"""exchange: XLA's collectives on a CPU; what the kernel needs is asked for.

The kernel itself cannot be interpreted (no signals between devices): that it
assembles, and keeps its mailboxes in place, stands in `tests/sm90a`; that it is
right needs several GPUs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.exchange import api, mosaic_gpu
from pallas_kernels.exchange.mailbox import from_words, pieces_of, to_words

AXIS = "device"
PEERS = 4

on_gpus = pytest.param("mosaic_gpu", marks=pytest.mark.multi_gpu)


def run(body, *args):
  """Runs on several devices what each does with its entry of the arguments."""
  devices = np.asarray(jax.devices()[:PEERS])

  def local(*args):
    return jax.tree.map(lambda x: x[None], body(*(x[0] for x in args)))

  return jax.tree.map(
    np.asarray,
    jax.jit(
      jax.shard_map(
        local,
        mesh=Mesh(devices, (AXIS,)),
        in_specs=PartitionSpec(AXIS),
        out_specs=PartitionSpec(AXIS),
        check_vma=False,
      )
    )(*args),
  )


def drawn(*shape):
  rng = np.random.default_rng(0)
  devices = min(PEERS, jax.device_count())
  return rng.standard_normal((devices, *shape), dtype=np.float32)


@pytest.mark.parametrize("implementation", ["xla", on_gpus])
@pytest.mark.parametrize("shape", [(2, 4, 16), (4, 32, 129), (3,)])
@pytest.mark.parametrize("is_split", [False, True])
def test_many_calls_carry_everything_everywhere(
  shape, implementation, is_split
):
  x = drawn(*shape)
  size, num_calls = len(x), 50

  def body(x):
    gather = api.open_mailbox(shape, jnp.float32, AXIS)
    swap = api.open_mailbox(shape, jnp.float32, AXIS)
    options = {"axis_name": AXIS, "implementation": implementation}
    if is_split:
      options |= {"beside": jnp.sin, "operand": x}

    def call(x, *, is_first=False):
      all_of_them, _ = api.all_gather(x, gather, is_first=is_first, **options)
      mine, _ = api.all_to_all(
        all_of_them + x, swap, is_first=is_first, **options
      )
      # What came from the next one: x of all moves on, and x of mine is added.
      me = jax.lax.axis_index(AXIS)
      return (mine[(me + 1) % size] - x) / 2

    first = call(x, is_first=True)
    return jax.lax.fori_loop(1, num_calls, lambda _, x: call(x), first)

  want = x
  for _ in range(num_calls):
    # From device j device i gets x[i] + x[j].
    following = np.roll(want, -1, axis=0)
    want = ((want + following) - want) / np.float32(2)
  np.testing.assert_array_equal(run(body, x), want)


@pytest.mark.parametrize("implementation", ["xla", on_gpus])
def test_what_is_beside_comes_back_too(implementation):
  x = drawn(8).astype(jnp.bfloat16)

  def body(x):
    return api.all_gather(
      x,
      api.open_mailbox((8,), jnp.bfloat16, AXIS),
      axis_name=AXIS,
      beside=lambda y: y + 1,
      operand=x,
      is_first=True,
      implementation=implementation,
    )

  gathered, beside = run(body, x)
  for mine in gathered:
    np.testing.assert_array_equal(mine, x)
  np.testing.assert_array_equal(beside, x + jnp.bfloat16(1))


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [((4, 32, 129), "float32"), ((3, 5), "bfloat16"), ((1,), "int32")],
)
def test_words_give_messages_back_to_the_bit(shape, dtype):
  bits = np.random.default_rng(0).integers(0, 256, (2, *shape, 4), np.uint8)
  messages = jnp.asarray(
    bits[..., : jnp.dtype(dtype).itemsize].copy().view(dtype)[..., 0]
  )

  def body(x):
    box = api.open_mailbox(shape, dtype, AXIS)
    words = to_words(x, box.data.shape[2:])
    return words, from_words(words, box)

  words, back = run(body, jnp.stack([messages] * PEERS))
  assert words.dtype == np.int32
  assert words.shape[2:] == pieces_of(messages[0].size * back.dtype.itemsize)
  np.testing.assert_array_equal(
    back[0].view(np.uint8), np.asarray(messages).view(np.uint8)
  )


@pytest.mark.parametrize(
  ("num_bytes", "pieces"),
  [(1, (1, 512)), (8192, (1, 2048)), (8193, (5, 512)), (66048, (33, 512))],
)
def test_pieces_are_whole_rounds(num_bytes, pieces):
  assert pieces_of(num_bytes) == pieces


def body_of(x, box_shape, dtype=jnp.float32, **options):
  def body(x):
    box = api.open_mailbox(box_shape, dtype, AXIS)
    return api.all_to_all(x, box, axis_name=AXIS, **options)[0]

  return functools.partial(run, body, x)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (body_of(drawn(2, 8), (8,)), r"x must be \[4, ...\]; got \[2, 8\]"),
    (
      body_of(drawn(4, 8), (9,)),
      r"mailbox must be for float32\[8\]; got float32\[9\]",
    ),
    (
      body_of(drawn(4, 8), (8,), jnp.int32),
      r"mailbox must be for float32\[8\]; got int32\[8\]",
    ),
    (
      body_of(drawn(4, 8).astype(np.float16), (8,)),
      "x must be bfloat16, float32 or int32; got float16",
    ),
  ],
)
def test_wrong_calls_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_the_kernel_says_what_it_does_not_cover():
  large = 600 * 4 * 2048 // PEERS

  def exchange(shape, *, opens=True):
    def body(x):
      box = api.open_mailbox(shape, jnp.float32, AXIS) if opens else None
      return mosaic_gpu.all_gather(x, box, AXIS, None, None, is_first=True)[0]

    return jax.eval_shape(functools.partial(run, body), drawn(*shape))

  with pytest.raises(NotImplementedError, match="x: at most 528 pieces"):
    exchange((large,))
  with pytest.raises(NotImplementedError, match="mailbox: one from"):
    exchange((8,), opens=False)
  with pytest.raises(NotImplementedError, match="default backend"):
    body_of(drawn(4, 8), (8,), implementation="mosaic_gpu")()


class Peer:
  """One device of the protocol that `Mailbox` describes, a step at a time.

  A step is: to write its message into everybody's half, to count up everybody's
  counter, or to read all halves once all have arrived.
  """

  def __init__(self, me, peers):
    self.me, self.peers = me, peers
    self.halves = [[None] * peers for _ in range(2)]
    self.arrived = [0] * peers
    self.read = 0
    self.step = 0

  def can_go_on(self):
    others = (n for i, n in enumerate(self.arrived) if i != self.me)
    return self.step < 2 or all(n > self.read for n in others)

  def go_on(self, everybody):
    half = self.read % 2
    for peer in everybody:
      if self.step == 0:
        peer.halves[half][self.me] = self.read
      elif self.step == 1:
        peer.arrived[self.me] += 1
    if self.step == 2:
      assert self.halves[half] == [self.read] * self.peers
      self.read += 1
    self.step = (self.step + 1) % 3

  def state(self):
    return (*map(tuple, self.halves), tuple(self.arrived), self.read, self.step)

  def copy(self):
    other = Peer(self.me, self.peers)
    other.halves = [list(half) for half in self.halves]
    other.arrived = list(self.arrived)
    other.read, other.step = self.read, self.step
    return other


@pytest.mark.parametrize(("peers", "calls"), [(2, 6), (3, 4)])
def test_in_no_order_is_an_unread_message_written_over(peers, calls):
  pending = [[Peer(i, peers) for i in range(peers)]]
  seen, most_ahead, ends = set(), 0, 0
  while pending:
    everybody = pending.pop()
    key = tuple(peer.state() for peer in everybody)
    if key in seen:
      continue
    seen.add(key)
    most_ahead = max(
      most_ahead,
      *(a.read - b.read for a, b in itertools.permutations(everybody, 2)),
    )
    able = [p.me for p in everybody if p.read < calls and p.can_go_on()]
    ends += not able
    if not able:
      assert all(peer.read == calls for peer in everybody)  # Nobody waits on.
    for me in able:
      others = [peer.copy() for peer in everybody]
      others[me].go_on(others)
      pending.append(others)
  assert ends
  assert most_ahead == 1  # So that two halves are needed, and enough.
