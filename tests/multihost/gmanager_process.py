"""A gManager in a process of its own, until it is killed.

python -m tests.multihost.gmanager_process LISTEN INCARNATION INSTANCE=TARGET...
"""

import sys
import time

from infinite_llm.config import LendingConfig
from infinite_llm.distributed.transport.grpc_options import GrpcOptions
from infinite_llm.distributed.transport.grpc_transport import GrpcTransport
from infinite_llm.scheduler.gmanager import GManager
from infinite_llm.scheduler.messages import GMANAGER


def main(listen: str, incarnation: str, *peers: str) -> None:
  """Answers rManagers."""
  transport = GrpcTransport(GrpcOptions(listen=listen))
  for peer in peers:
    instance, target = peer.split("=")
    transport.connect(int(instance), target)
  gmanager = GManager(
    LendingConfig(policy="borrow"),
    time.monotonic,
    incarnation=int(incarnation),
  )
  transport.register(GMANAGER, gmanager.on_message)
  print("ready", flush=True)
  while True:
    if transport.wait(1.0):
      transport.deliver()
      for envelope in gmanager.drain_messages():
        transport.send(envelope)


if __name__ == "__main__":
  main(*sys.argv[1:])
