"""Draws the pools of a lending group: whose KV lies where."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from experiments.block_map import BlockMap, BlockUse
from infinite_llm.cache.rblock import BlockState
from infinite_llm.types import InstanceId

_LONG = "#e8762c"
_SHORT = ("#2f6fb2", "#3fa796", "#8b62b5", "#63a8d8", "#2e8b57", "#b05c9a")
_OTHER = "#7f8fa6"
_FREE = "#ececec"
_INK = "#333333"
_HATCH = "////"
_PALE = 0.55  # Of a colour: reserved rBlocks, whose KV is yet to come.
_MOST_CUTS = 300  # Of the bar.
_LEFT, _WIDTH = 0.035, 0.93  # Of the figure.
_MOST_LINED_BLOCKS = 4000  # Of a pool; more would be all lines.


def plot_block_map(
  block_map: BlockMap,
  request: str,
  path: str | os.PathLike[str],
  *,
  title: str,
  marks: Mapping[str, int] | None = None,
) -> None:
  """Writes a picture of all pools, and of one long request's way through them.

  Args:
    block_map: The pools.
    request: Name of the request to show as a whole; it must have rBlocks.
    path: File to write; its ending names the format.
    title: Headline.
    marks: Token positions of the request to point at, by label.
  """
  num_pools = len(block_map.pools)
  columns = min(num_pools, 4)
  rows = -(-num_pools // columns)
  owner = _owner(block_map, request)
  colors = _colors(block_map, request)

  # Inches from the top for what is above the pools, then below them.
  top, bottom, pool = 2.95, 0.5, 3.6
  height = top + bottom + pool * rows
  figure = Figure(figsize=(13, height), dpi=130, facecolor="white")

  def write(inches: float, text: str, **style: object) -> None:
    figure.text(_LEFT, 1 - inches / height, text, color=_INK, **style)

  write(0.45, title, fontsize=15, weight="bold")
  write(
    0.86,
    "The long request from its first token to its last: the instance that holds"
    " each part of it"
    + (", and the pass keys it is asked for:" if marks else ":"),
    fontsize=10.5,
  )
  bar = figure.add_axes((_LEFT, 1 - 1.45 / height, _WIDTH, 0.42 / height))
  _draw_bar(bar, block_map, request, owner, marks or {})
  write(
    2.18,
    f"The memory of all instances: a square is one rBlock, the keys and values"
    f" of {block_map.block_size} tokens in all layers:",
    fontsize=10.5,
  )
  grid = figure.add_gridspec(
    rows,
    columns,
    left=_LEFT,
    right=_LEFT + _WIDTH,
    bottom=bottom / height,
    top=1 - top / height,
    wspace=0.08,
    hspace=0.25,
  )
  for instance, uses in enumerate(block_map.pools):
    axes = figure.add_subplot(grid[divmod(instance, columns)])
    _draw_pool(axes, uses, instance, request, colors)
    axes.set_title(
      _pool_title(block_map, instance, owner),
      fontsize=10.5,
      color=_INK,
      linespacing=1.4,
    )
  legend = _legend(block_map, colors, request)
  figure.legend(
    handles=legend,
    loc="lower center",
    ncols=len(legend),
    frameon=False,
    fontsize=9.5,
    columnspacing=1.3,
    handlelength=1.6,
    handleheight=1.2,
  )
  figure.savefig(path)


def _owner(block_map: BlockMap, request: str) -> InstanceId:
  return next(
    use.owner
    for use in itertools.chain(*block_map.pools)
    if use.request == request and use.owner is not None
  )


def _colors(block_map: BlockMap, request: str) -> dict[str, str]:
  """Returns a colour for each request; the long one comes first."""
  names = {use.request for use in itertools.chain(*block_map.pools)}
  others = sorted(names - {request, None}, key=_natural)
  colors = itertools.chain(_SHORT, itertools.repeat(_OTHER))
  return {request: _LONG, **dict(zip(others, colors, strict=False))}


def _natural(name: str) -> tuple[int, str]:
  """Sorts short-9 before short-10."""
  return len(name), name


def _draw_bar(
  axes: Axes,
  block_map: BlockMap,
  request: str,
  owner: InstanceId,
  marks: Mapping[str, int],
) -> None:
  """One request from left to right, cut where its rBlocks change place."""
  holders = block_map.holders[request]
  at_home, lent, cuts = [], [], []
  start = 0
  for holder, group in itertools.groupby(holders):
    length = len(list(group))
    part = Rectangle((start, 0), length, 1)
    (at_home if holder == owner else lent).append(part)
    cuts.append([(start, 0), (start, 1)])
    share = length / len(holders)
    if share >= 0.01:
      axes.text(
        start + length / 2,
        0.5,
        _part_label(holder, owner, share),
        ha="center",
        va="center",
        fontsize=9.5,
        color=_INK,
        bbox={
          "boxstyle": "round,pad=0.25",
          "facecolor": "white",
          "edgecolor": "none",
        },
      )
    start += length
  _add_rectangles(axes, at_home, _LONG)
  _add_rectangles(axes, lent, _LONG, hatch=_HATCH)
  if len(cuts) <= _MOST_CUTS:
    axes.add_collection(LineCollection(cuts, colors="white", linewidths=2))
  for label, position in marks.items():
    block = position / block_map.block_size
    axes.annotate(
      label,
      (block, 0),
      (block, -0.42),
      ha="center",
      va="top",
      fontsize=9,
      color=_INK,
      arrowprops={"arrowstyle": "-|>", "color": _INK, "linewidth": 1},
      annotation_clip=False,
    )
  axes.set_xlim(0, len(holders))
  axes.set_ylim(0, 1)
  axes.axis("off")


def _part_label(holder: InstanceId, owner: InstanceId, share: float) -> str:
  """As much as fits on that share of the bar."""
  if share < 0.06:
    return str(holder)
  if share < 0.12:
    return f"instance {holder}"
  return f"{'at home on' if holder == owner else 'lent by'} instance {holder}"


def _draw_pool(
  axes: Axes,
  uses: Sequence[BlockUse],
  instance: InstanceId,
  request: str,
  colors: Mapping[str, str],
) -> None:
  """A pool as a grid, row by row from the top left."""
  width = math.ceil(math.sqrt(len(uses) * 0.85))
  plain, hosted, reserved = [], [], []
  for run, use in _runs(uses, width):
    color = _FREE if use.request is None else colors.get(use.request, _OTHER)
    if use.owner not in (None, instance):
      hosted.append((run, color))
    elif _is_filling(use, instance):
      reserved.append((run, color))
    else:
      plain.append((run, color))
  for colored, style in (
    (plain, {}),
    (reserved, {"alpha": _PALE}),
    (hosted, {"hatch": _HATCH}),
  ):
    if colored:
      _add_rectangles(axes, *zip(*colored, strict=True), **style)
  height = -(-len(uses) // width)
  if len(uses) <= _MOST_LINED_BLOCKS:
    lines = [[(x, 0), (x, height)] for x in range(width + 1)]
    lines += [[(0, y), (width, y)] for y in range(height + 1)]
    axes.add_collection(
      LineCollection(lines, colors="white", linewidths=14 / width)
    )
  axes.set_xlim(0, width)
  axes.set_ylim(height, 0)
  axes.set_aspect("equal", anchor="N")
  axes.axis("off")


def _is_filling(use: BlockUse, instance: InstanceId) -> bool:
  """Whether an rBlock at home is taken, but has not all of its KV yet."""
  is_home = use.owner in (None, instance)
  return is_home and use.state is BlockState.RESERVED


def _add_rectangles(
  axes: Axes,
  rectangles: Sequence[Rectangle],
  colors: str | Sequence[str],
  **style: object,
) -> None:
  axes.add_collection(
    PatchCollection(
      rectangles, facecolors=colors, edgecolors="white", linewidths=0, **style
    )
  )


def _runs(
  uses: Sequence[BlockUse], width: int
) -> Iterator[tuple[Rectangle, BlockUse]]:
  """Equal rBlocks beside each other in a row, as one rectangle."""
  for y, start in enumerate(range(0, len(uses), width)):
    x = 0
    for use, group in itertools.groupby(uses[start : start + width]):
      length = len(list(group))
      yield Rectangle((x, y), length, 1), use
      x += length


def _pool_title(
  block_map: BlockMap, instance: InstanceId, owner: InstanceId
) -> str:
  uses = block_map.pools[instance]
  in_use = sum(use.request is not None for use in uses)
  use = f"{in_use} of {len(uses)} rBlocks in use"
  lent = block_map.num_hosted(instance, owner)
  if instance == owner:
    role = "runs the long request"
  elif lent:
    role = f"lends {lent} to instance {owner}"
  else:
    role = "lends nothing"
  return f"Instance {instance}: {role}\n{use}"


def _legend(
  block_map: BlockMap, colors: Mapping[str, str], request: str
) -> list[Patch]:
  patches = [
    Patch(facecolor=_LONG, label=f"{request}, at home"),
    Patch(
      facecolor=_LONG,
      edgecolor="white",
      hatch=_HATCH,
      linewidth=0,
      label=f"{request}, on lent rBlocks",
    ),
  ]
  patches += [
    Patch(facecolor=color, label=name)
    for name, color in colors.items()
    if name != request and color != _OTHER
  ]
  if _OTHER in colors.values():
    patches.append(Patch(facecolor=_OTHER, label="other requests"))
  is_any_pale = any(
    _is_filling(use, instance)
    for instance, uses in enumerate(block_map.pools)
    for use in uses
  )
  if is_any_pale:
    pale = Patch(facecolor=_SHORT[0], alpha=_PALE, label="pale: being filled")
    patches.append(pale)
  patches.append(Patch(facecolor=_FREE, label="free"))
  return patches
