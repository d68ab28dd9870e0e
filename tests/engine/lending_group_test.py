import time

import pytest

from infinite_llm.config import engine_config
from infinite_llm.distributed.step_header import OwnOrder
from infinite_llm.distributed.transport.in_process import InProcessTransport
from infinite_llm.engine.lending_group import LendingGroup
from infinite_llm.errors import ConfigError


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"policy": "swap"}, "host_blocks must be at least 2 for policy 'swap'"),
    (
      {"policy": "migrate"},
      "one of borrow, greedy, static, swap in an engine; got 'migrate'",
    ),
    ({"policy": "greedy"}, "performance_profile.* must be a model"),
    (
      {"policy": "greedy", "performance_profile": "none.json"},
      "path must name a performance profile; got 'none.json'",
    ),
  ],
)
def test_options_that_it_cannot_carry_out_are_refused(options, text):
  config = engine_config(num_instances=2, num_blocks=9, **options)

  # It is refused before the devices are touched.
  with pytest.raises(ConfigError, match=text):
    LendingGroup(
      config, None, time.monotonic, InProcessTransport(), OwnOrder(1024)
    )


def test_several_processes_attend_no_host_memory():
  config = engine_config(
    num_instances=2, num_blocks=9, host_blocks=9, host_attention=True
  )
  order = OwnOrder(1024)
  order.is_shared = True

  with pytest.raises(ConfigError, match="host_attention must be False in an"):
    LendingGroup(config, None, time.monotonic, InProcessTransport(), order)
