"""One-sided exchanges assemble for Hopper; mailboxes stay where they are."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.one_sided_exchange import one_sided_exchanges
from infinite_llm.attention.dist_attention import (
  SpillSlots,
  Window,
  decode_attention,
)
from infinite_llm.distributed.mesh import make_mesh
from infinite_llm.types import INSTANCE_AXIS
from pallas_kernels.exchange import api
from pallas_kernels.micro_attention.api import BlockTables

SLOTS, ROWS, HEADS, HEAD_DIM, BLOCKS = 4, 64, 32, 128, 64
POOL = (BLOCKS, 2, 2, 8, 64, HEAD_DIM)
MEETS, GOES_ON = "false", "true"

on_devices = pytest.mark.parametrize("num_devices", [2, 4])


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
  # The kernels for GPUs are taken where JAX runs on one.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def _compile(sm90a, body, *args):
  """Compiles what each device does with arrays of these shapes."""
  mesh = make_mesh(len(sm90a.devices), 1, sm90a.devices)
  spec = PartitionSpec(INSTANCE_AXIS)
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (len(sm90a.devices) * x.shape[0], *x.shape[1:]),
      x.dtype,
      sharding=NamedSharding(mesh, spec),
    ),
    args,
  )
  run = jax.shard_map(
    body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  compiled, spills = sm90a.compile(run, *args)
  assert not any(spills)
  return compiled.as_text()


def _kernels(text: str) -> list[tuple[str, str]]:
  """The exchange's kernels, and whether they skip the meeting of devices."""
  return re.findall(
    r"/exchange_(\w+)/.*skip_device_barrier = (true|false)", text
  )


def _layer(x, mailbox, collective, *, is_first=False):
  got, _ = collective(
    x,
    mailbox,
    axis_name=INSTANCE_AXIS,
    is_first=is_first,
    implementation="mosaic_gpu",
  )
  return got


@on_devices
@pytest.mark.parametrize("is_loop", [False, True])
def test_mailboxes_are_never_copied_and_devices_meet_once(
  sm90a_devices, monkeypatch, num_devices, is_loop
):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  sm90a = sm90a_devices(num_devices)
  queries, states = (SLOTS, HEADS, HEAD_DIM), (SLOTS, HEADS, HEAD_DIM + 1)

  def body(q, state):
    boxes = (
      api.open_mailbox(queries, jnp.bfloat16, INSTANCE_AXIS),
      api.open_mailbox(states, jnp.float32, INSTANCE_AXIS),
    )

    def layer(q, state, *, is_first=False):
      q = _layer(q, boxes[0], api.all_gather, is_first=is_first).sum(0)
      state = _layer(state, boxes[1], api.all_to_all, is_first=is_first) + 1
      return q.astype(jnp.bfloat16), state

    carry = layer(q, state, is_first=True)
    if is_loop:
      return jax.lax.fori_loop(0, 5, lambda _, c: layer(*c), carry)
    for _ in range(2):
      carry = layer(*carry)
    return carry

  text = _compile(
    sm90a,
    body,
    jax.ShapeDtypeStruct(queries, jnp.bfloat16),
    jax.ShapeDtypeStruct((num_devices, *states), jnp.float32),
  )
  meetings = [meets for _, meets in _kernels(text)]
  assert meetings.count(MEETS) == 2
  assert meetings.count(GOES_ON) == (2 if is_loop else 4)
  # Only counters are ever set to zero by copying; no call moves a mailbox.
  entry = text[text.index("\nENTRY ") :]
  assert not re.search(rf"s32\[(2,)?{num_devices},\d.*\] copy\(", entry)
  assert ".entry exchange_send_receive" in sm90a.said
  assert "red.release.sys" in sm90a.said
  assert "multimem" not in sm90a.said
  assert "symmetric_memory_parameters" not in text  # Of multicast too.
  # A peer's memory is written by words, and never read.
  assert "st.b32" in sm90a.said
  assert "st.b16" not in sm90a.said
  assert not re.search(r"\tld\.(b|u|v)", sm90a.said)


@on_devices
def test_local_attention_runs_between_sending_and_receiving(
  sm90a_devices, num_devices
):
  asked = num_devices * SLOTS
  ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  tables = [
    BlockTables(*(ints((n,)) for n in (BLOCKS, BLOCKS, rows, rows)))
    for rows in (ROWS, asked)
  ]
  slots = SpillSlots(
    ints((SLOTS,)),
    jax.ShapeDtypeStruct((SLOTS,), jnp.uint32),
    ints((SLOTS, num_devices)),
  )

  def body(q, kv, positions, asked, own, answered, slots):
    exchanges = one_sided_exchanges(SLOTS, HEADS, HEAD_DIM, q.dtype)
    for layer, exchange in zip(range(2), exchanges, strict=False):
      state = decode_attention(
        q,
        positions,
        kv,
        layer,
        own,
        answered,
        asked,
        slots,
        Window(HEAD_DIM**-0.5, None, 1),
        exchange,
      )
      q = state.out.astype(q.dtype)
    return q

  text = _compile(
    sm90a_devices(num_devices),
    body,
    jax.ShapeDtypeStruct((ROWS, HEADS, HEAD_DIM), jnp.bfloat16),
    jax.ShapeDtypeStruct(POOL, jnp.bfloat16),
    ints((ROWS,)),
    ints((asked,)),
    *tables,
    slots,
  )
  words = {
    r"/exchange_(\w+)/mpmd_map": None,
    rf"= \(f32\[{ROWS},32,128\].*custom-call": "local",
    rf"= \(f32\[{asked},32,128\].*custom-call": "hosted",
  }
  found = []
  for line in text[text.index("\nENTRY ") :].splitlines():
    if "custom-call(" in line:
      for rule, word in words.items():
        if match := re.search(rule, line):
          found.append(word or match[1])
  layer = ["send_receive", "hosted", "send", "local", "receive"]
  assert found == 2 * layer
  # Queries pass through the sending kernel in place, but for an argument.
  assert len(re.findall(rf"= bf16\[{ROWS},32,128\]\S* copy\(", text)) == 1
  assert "all-gather" not in text
  assert "all-to-all" not in text
