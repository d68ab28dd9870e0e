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
    ({"policy": "swap"}, "policy must be one of borrow, greedy, static in an"),
    ({"policy": "migrate"}, "in an engine; got 'migrate'"),
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
      config, None, time.monotonic, InProcessTransport(), OwnOrder(32)
    )
