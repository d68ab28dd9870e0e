"""Named places in the managers where a simulation may have something go wrong.

A manager takes a `FaultPoint` when it is built and asks it at these places;
whoever answers may also raise, or do something else first. With `no_fault`, the
default, a place costs one call.
"""

import enum


class Place(enum.StrEnum):
  """What goes wrong where the answer is yes: deliberate bugs, one at a time.

  Attributes:
    EPOCH_UNCHECKED: A creditor takes a lease for another one of the same rBlock
      with another reservation epoch.
    CAP_IGNORED: A creditor lends all that is free.
    REFUSAL: A creditor has nothing to lend. The refusal stands whatever the
      answer is; a simulation that forwards borrows begins them here.
    COMMIT_UNRESERVED: A creditor hosts what it never reserved.
    EPOCHS_KEPT: A creditor's device goes on accepting payloads for a lease that
      has ended.
    TABLE_KEPT: A creditor goes on answering with rBlocks that were given back.
    EXPIRY_SKIPPED: A creditor never ends leases of a silent owner.
    REPETITION_EXECUTED: A repeated request is executed again.
    DEAD_HEARD: A message of an incarnation that is gone is executed.
    MISDIRECTED_EXECUTED: A request that was meant for an earlier incarnation is
      executed.
    RESTART_OVERLOOKED: An owner keeps what it had at a creditor that began
      anew.
    DEAD_DEBTS_KEPT: A creditor keeps what an owner that began anew had borrowed
      before.
    TRUST_UNLIMITED: An owner reads what it has elsewhere however long its
      creditor has been silent.
    COMMIT_SKIPPED: An owner switches to copies that its creditor does not serve
      yet.
    PROOF_SKIPPED: An owner gives old copies up although nothing was proved.
    FREED_TWICE: A closed request frees its old copies once more.
    RELEASE_FORGOTTEN: A closed request gives nothing back.
    HOME_EPOCHS_KEPT: An owner's device goes on accepting payloads for a recall
      that has ended.
    HOME_FREED_EARLY: rBlocks are free in HBM before their copies in HOST are
      acknowledged.
    DROPPED_EARLY: What nobody wants any more is free in both tiers before its
      copies have ended.
    HOST_KEPT: A request whose copies in HBM were proved keeps those in HOST.
  """

  EPOCH_UNCHECKED = "epoch unchecked"
  CAP_IGNORED = "cap ignored"
  REFUSAL = "refusal"
  COMMIT_UNRESERVED = "commit unreserved"
  EPOCHS_KEPT = "epochs kept"
  TABLE_KEPT = "table kept"
  EXPIRY_SKIPPED = "expiry skipped"
  REPETITION_EXECUTED = "repetition executed"
  DEAD_HEARD = "dead heard"
  MISDIRECTED_EXECUTED = "misdirected executed"
  RESTART_OVERLOOKED = "restart overlooked"
  DEAD_DEBTS_KEPT = "dead debts kept"
  TRUST_UNLIMITED = "trust unlimited"
  COMMIT_SKIPPED = "commit skipped"
  PROOF_SKIPPED = "proof skipped"
  FREED_TWICE = "freed twice"
  RELEASE_FORGOTTEN = "release forgotten"
  HOME_EPOCHS_KEPT = "home epochs kept"
  HOME_FREED_EARLY = "home freed early"
  DROPPED_EARLY = "dropped early"
  HOST_KEPT = "host kept"


class Mishap(enum.StrEnum):
  """What may go wrong at any time, and harms nobody if the code is right.

  Where somebody dies, whoever is asked raises, and all that the manager had is
  lost.

  Attributes:
    ALLOCATION_FAILS: An owner gets no rBlocks at home.
    GRANT_FAILS: A creditor grants half of what it could, rounded down.
    SWAP_FAILS: A request that is to wait in HOST finds no room there.
    HEARTBEAT_SKIPPED: An rManager says nothing for a heartbeat period, and
      renews no lease.
    RANKING_FAILS: A gManager proposes nobody.
    DEATH_BEFORE_ANSWER: A creditor dies when it has executed a request, and has
      not said so.
    DEATH_WHILE_SENDING: A manager dies when some of its messages are sent, and
      the rest, and what its devices were to do, is not.
  """

  ALLOCATION_FAILS = "allocation fails"
  GRANT_FAILS = "grant fails"
  SWAP_FAILS = "swap fails"
  HEARTBEAT_SKIPPED = "heartbeat skipped"
  RANKING_FAILS = "ranking fails"
  DEATH_BEFORE_ANSWER = "death before answer"
  DEATH_WHILE_SENDING = "death while sending"


def no_fault(place: str) -> bool:
  """Answers no: nothing goes wrong."""
  return False
