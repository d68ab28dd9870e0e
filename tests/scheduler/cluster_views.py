"""Views of clusters, in few words, and what moves and recalls make of them."""

import collections

from hypothesis import strategies as st

from infinite_llm.scheduler.cluster_view import (
  ClusterView,
  LedgerLine,
  Placement,
)
from infinite_llm.scheduler.link_costs import LinkCosts
from infinite_llm.scheduler.messages import RequestBlocks
from infinite_llm.scheduler.performance_model import (
  Load,
  PerformanceModel,
  Profile,
)


def line(instance, free, capacity=10, **fields):
  """An instance that lends all that is free."""
  return LedgerLine(
    instance=instance,
    capacity=capacity,
    free=free,
    lendable=fields.pop("lendable", free),
    **fields,
  )


def placement(owner, uid, holders, movable=0):
  blocks = RequestBlocks(
    uid=uid, holders=tuple(sorted(holders.items())), movable=movable
  )
  return Placement(owner=owner, blocks=blocks)


def view(lines, placements=(), links=None):
  return ClusterView(
    lines=tuple(lines),
    placements=tuple(placements),
    links=links or LinkCosts(),
  )


def debt_view(*debts):
  """A view of nothing but debts: `(debtor, creditor, rBlocks)`, one request
  each, with uids from 1."""
  lent = collections.defaultdict(dict)
  for debtor, creditor, count in debts:
    lent[creditor][debtor] = lent[creditor].get(debtor, 0) + count
  instances = {i for debtor, creditor, _ in debts for i in (debtor, creditor)}
  return view(
    [
      line(i, 0, debts=tuple(sorted(lent[i].items())))
      for i in sorted(instances)
    ],
    [
      placement(debtor, uid, {creditor: count})
      for uid, (debtor, creditor, count) in enumerate(debts, start=1)
    ],
  )


def shuffled(data, some_view):
  """The same view with everything in another order."""
  return ClusterView(
    lines=tuple(data.draw(st.permutations(some_view.lines))),
    placements=tuple(data.draw(st.permutations(some_view.placements))),
    links=some_view.links,
  )


# One second for each request of a batch up to 4, a quarter of that from there
# on, in steps; a second for 100 tokens; one layer.
MODEL = PerformanceModel(
  num_layers=1,
  work_per_token=1.0,
  batch_speed=Profile(at=(1, 4), per_s=(1, 4)),
  attention_speed=Profile(at=(1,), per_s=(100,)),
)


def loads(some_view, block_size):
  """What each instance does, read off the view the long way round."""
  tokens = collections.Counter()
  for item in some_view.placements:
    for holder, count in item.blocks.holders:
      tokens[holder] += count * block_size
  return {
    item.instance: Load(
      batch=item.num_running, tokens=float(tokens[item.instance])
    )
    for item in some_view.lines
  }


def debts_of(some_view):
  """Pairs of owner and holder."""
  return [
    (item.owner, holder)
    for item in some_view.placements
    for holder, _ in item.blocks.holders
    if holder != item.owner
  ]


@st.composite
def views(draw):
  """Clusters of at most 7 instances whose books agree with each other."""
  instances = sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=7)))
  held = collections.Counter()
  lent = collections.defaultdict(collections.Counter)
  running = collections.Counter()
  placements = []
  for uid in range(1, draw(st.integers(0, 12)) + 1):
    owner = draw(st.sampled_from(instances))
    holders = draw(
      st.dictionaries(
        st.sampled_from(instances), st.integers(1, 40), max_size=3
      )
    )
    running[owner] += 1
    if not holders:
      continue
    for holder, count in holders.items():
      held[holder] += count
      if holder != owner:
        lent[holder][owner] += count
    movable = draw(st.integers(0, holders.get(owner, 0)))
    placements.append(placement(owner, uid, holders, movable))
  lines = []
  for instance in instances:
    free = draw(st.integers(0, 60))
    num_waiting = draw(st.integers(0, 6))
    lines.append(
      line(
        instance,
        free,
        held[instance] + free,
        lendable=draw(st.integers(0, free)),
        num_running=running[instance],
        num_waiting=num_waiting,
        next_blocks=draw(st.integers(1, 20)) if num_waiting else 0,
        debts=tuple(sorted(lent[instance].items())),
      )
    )
  domains = draw(
    st.none() | st.lists(st.integers(0, 2), max_size=10).map(tuple)
  )
  links = LinkCosts(
    domains=domains,
    within_s=1.0,
    between_s=draw(st.sampled_from([2.0, float("inf")])),
  )
  return view(lines, placements, links)
