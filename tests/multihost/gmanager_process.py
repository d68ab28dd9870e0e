"""A gManager in a process of its own, until it is killed.

python -m tests.multihost.gmanager_process LISTEN ADDRESS INCARNATION
  PEER=TARGET...
"""

import sys
import time

from infinite_llm.config import LendingConfig
from infinite_llm.distributed.transport.grpc_options import GrpcOptions
from infinite_llm.distributed.transport.grpc_transport import GrpcTransport
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.messages import GMANAGER, STANDBY


def main(listen: str, address: str, incarnation: str, *peers: str) -> None:
  """Answers rManagers, or stands by; `docs/planning.md` has the same lines."""
  transport = GrpcTransport(GrpcOptions(listen=listen))
  others = []
  for peer in peers:
    name, target = peer.split("=")
    transport.connect(int(name) if name.isdigit() else name, target)
    if name in (GMANAGER, STANDBY):
      others.append(name)
  lending = LendingConfig()
  gmanager = GManager(
    lending,
    time.monotonic,
    address=address,
    peers=others,
    incarnation=int(incarnation),
    is_leader=address == GMANAGER,
  )
  transport.register(address, gmanager.on_message)
  print("ready", flush=True)
  while True:
    transport.wait(lending.leader_beat_s)
    transport.deliver()
    gmanager.tick()
    for envelope in gmanager.drain_messages():
      transport.send(envelope)


if __name__ == "__main__":
  main(*sys.argv[1:])
