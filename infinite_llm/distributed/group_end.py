"""How a process ends with its group."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from infinite_llm.distributed.group_link import (
  LeaderLink,
  MemberLink,
  shows_loss,
)
from infinite_llm.distributed.group_messages import Close
from infinite_llm.distributed.runtime import ProcessGroup
from infinite_llm.errors import GroupError

BROKEN_GROUP = 75
"""Exit status of a process whose group is broken (`EX_TEMPFAIL`): another try
may go well."""

_LOOK_EVERY_S = 0.2
_GRACE_S = 3.0
"""How long the main thread may take to notice that the group is broken."""

_LAST_WORDS_S = 0.5
"""What a member says before it ends needs time to go out."""


@contextlib.contextmanager
def end_with_group(group: ProcessGroup) -> Iterator[None]:
  """Ends this process when its group ends, whatever it does just then.

  A device program that waits for a process that is gone may never return, nor
  may JAX's shutdown, which waits for all. So a process whose group is broken
  leaves without either, with the status `BROKEN_GROUP`.

  Args:
    group: Closed at the end.
  """
  over = threading.Event()

  def watch() -> None:
    while not over.wait(_LOOK_EVERY_S):
      if group.link.lost is not None:
        # Whoever is told of it in the ordinary way says so in better words.
        if not over.wait(_GRACE_S):
          _leave(f"error: {group.link.lost}", BROKEN_GROUP)
        return

  watcher = threading.Thread(target=watch, daemon=True, name="group-watcher")
  watcher.start()
  try:
    yield
  except BaseException as error:
    over.set()
    is_broken = isinstance(error, GroupError) or shows_loss(group.link, error)
    is_wrong_input = isinstance(error, ValueError)
    if not (is_broken or is_wrong_input):
      traceback.print_exc()
    if isinstance(group.link, LeaderLink):
      group.link.close()
    else:
      time.sleep(_LAST_WORDS_S)
    text = " ".join(str(error).split())
    status = BROKEN_GROUP if is_broken else 2 if is_wrong_input else 1
    _leave(f"error: {text or type(error).__name__}", status)
  over.set()
  group.close()


def await_close(link: LeaderLink | MemberLink, timeout_s: float) -> None:
  """Waits in a member until process 0 has ended its part too.

  Process 0 takes a stream that ends before for a lost process.

  Args:
    link: That of this process.
    timeout_s: How long process 0 may take.

  Raises:
    GroupError: If it takes longer, says anything else or is gone.
  """
  if not isinstance(link, MemberLink):
    raise GroupError("Process 0 is no member.")
  message = link.next(timeout_s)
  if not isinstance(message, Close):
    raise GroupError(f"Process 0 must say nothing but Close; got {message}.")


def _leave(text: str, status: int) -> None:
  print(text, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(status)
