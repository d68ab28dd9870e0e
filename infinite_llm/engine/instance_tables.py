"""Tables of one instance: what its devices have of them, and what they lack."""

from collections.abc import Sequence

from infinite_llm.attention.dist_attention import HostedRows
from infinite_llm.cache.block_entries import EntrySpan
from infinite_llm.cache.table_store import EntryWrites, TableStore
from infinite_llm.config import EngineConfig
from infinite_llm.engine.group_inputs import hosted_rows
from infinite_llm.scheduler.hosted_tables import HostedVersion


class InstanceTables:
  """Own and hosted tables of one instance, in one store.

  Hosted tables stay where they are until they change or everything is placed
  anew; then the devices are to be told where they lie.
  """

  def __init__(self, config: EngineConfig):
    """Makes the tables of an instance without requests that hosts nothing.

    Args:
      config: Sizes of everything.
    """
    self._config = config
    self._store = TableStore(config.cache.num_blocks)
    self._hosted: tuple[HostedVersion, ...] = ()
    self._told = self._store.generation

  @property
  def num_pending(self) -> int:
    """Entries that the devices lack."""
    return self._store.num_pending

  def take_writes(self) -> EntryWrites:
    """Takes those entries; they are to be written before anything is read."""
    return self._store.take_writes()

  def sync(self, spans: Sequence[EntrySpan]) -> list[int]:
    """Gives spans, and all that is hosted, a place; returns where each starts.

    Args:
      spans: Own entries that a program is about to read.
    """
    return self._store.sync(spans)

  def set_hosted(self, versions: tuple[HostedVersion, ...]) -> None:
    """Replaces what is hosted, and gives it a place.

    Args:
      versions: All versions that an owner may name.
    """
    self._hosted = versions
    self._store.pin(hosted.entries for hosted in versions)
    self._store.sync([])

  def hosted_rows(self) -> HostedRows:
    """Where hosted entries lie, as numpy arrays."""
    return hosted_rows(
      self._hosted,
      [self._store.start(hosted.entries) for hosted in self._hosted],
      self._config.num_instances,
      self._config.lending.spill_slots,
    )

  def take_moved(self) -> HostedRows | None:
    """`hosted_rows` if they are not what they were when last taken."""
    if self._told == self._store.generation:
      return None
    self._told = self._store.generation
    return self.hosted_rows()
