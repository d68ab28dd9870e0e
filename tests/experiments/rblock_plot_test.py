"""The picture of the pools. Whether it is clear, only eyes can tell."""

import itertools

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colors

from experiments import rblock_plot
from experiments.block_map import BlockMap, BlockUse
from infinite_llm.cache.rblock import BlockState

_FREE = BlockUse()


def _uses(count: int, request: str, owner: int, instance: int):
  state = BlockState.LIVE if owner == instance else BlockState.HOSTED
  return [BlockUse(state=state, request=request, owner=owner)] * count


def _block_map(num_instances: int) -> BlockMap:
  """Instance 0 has lent blocks on all others, which run one request each."""
  pools = [_uses(30, "long", 0, 0) + [_FREE] * 2]
  for instance in range(1, num_instances):
    pool = _uses(10, "long", 0, instance)
    pool += _uses(3, f"short-{instance}", instance, instance)
    pools.append(pool + [_FREE] * (32 - len(pool)))
  lent = itertools.chain(*([n] * 10 for n in range(1, num_instances)))
  return BlockMap(
    block_size=64,
    pools=tuple(map(tuple, pools)),
    holders={"long": (*lent, *[0] * 30)},
  )


def _draw(block_map: BlockMap, path) -> np.ndarray:
  rblock_plot.plot_block_map(
    block_map, "long", path, title="A title", marks={"#amber": 64}
  )
  return matplotlib.image.imread(path)


def _num_pixels(image: np.ndarray, color: str) -> int:
  return int(
    (np.abs(image[..., :3] - colors.to_rgb(color)) < 0.01).all(-1).sum()
  )


@pytest.mark.parametrize("num_instances", [1, 2, 4, 9])
def test_any_number_of_instances_can_be_drawn(tmp_path, num_instances):
  image = _draw(_block_map(num_instances), tmp_path / "map.png")
  assert image.shape[1] > 1500
  assert _num_pixels(image, rblock_plot._LONG) > 10_000


def test_area_follows_the_number_of_blocks(tmp_path):
  image = _draw(_block_map(2), tmp_path / "map.png")
  short = _num_pixels(image, rblock_plot._SHORT[0])
  free = _num_pixels(image, rblock_plot._FREE)
  # Three rBlocks of the short request, 21 free ones; and a legend entry each.
  assert 5.5 < free / short < 7.5


@pytest.mark.parametrize(
  ("state", "owner", "is_pale"),
  [
    (BlockState.LIVE, 0, False),
    (BlockState.RESERVED, 0, True),
    # What is lent is hatched, whatever its state.
    (BlockState.RESERVED, 1, False),
  ],
)
def test_the_legend_tells_what_pale_rblocks_are(state, owner, is_pale):
  use = BlockUse(state=state, request="short", owner=owner)
  pools = ((use, *_uses(3, "long", 0, 0)), tuple(_uses(3, "long", 0, 1)))
  block_map = BlockMap(block_size=64, pools=pools, holders={"long": (0, 1)})
  colors_of = rblock_plot._colors(block_map, "long")
  legend = rblock_plot._legend(block_map, colors_of, "long")
  labels = [patch.get_label() for patch in legend]
  assert ("pale: being filled" in labels) == is_pale


def test_a_large_pool_can_be_drawn(tmp_path):
  block_map = BlockMap(
    block_size=16,
    pools=(
      tuple(_uses(5_000, "long", 0, 0)),
      tuple(_uses(5_000, "long", 0, 1)),
    ),
    holders={"long": (0, 1) * 5_000},
  )
  assert _draw(block_map, tmp_path / "map.png").size


def test_blocks_held_for_another_instance_are_counted():
  block_map = _block_map(3)
  assert block_map.num_hosted(1, debtor=0) == 10
  assert block_map.num_hosted(2, debtor=1) == 0
