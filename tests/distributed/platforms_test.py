import pytest

from infinite_llm.distributed.platforms import check_platform, choose_platform
from infinite_llm.errors import ConfigError


def test_what_jax_runs_on_is_accepted():
  choose_platform("cpu")
  check_platform("cpu")


@pytest.mark.parametrize("platform", ["banana", "", "CPU", None])
def test_a_platform_of_another_name_is_refused(platform):
  message = rf"platform must be one of cpu, gpu; got {platform!r}\."
  with pytest.raises(ConfigError, match=message):
    choose_platform(platform)


def test_a_platform_that_is_not_there_is_no_other_one():
  choose_platform("gpu")
  message = r"platform must be what JAX runs on, cpu; got 'gpu'\."
  with pytest.raises(ConfigError, match=message):
    check_platform("gpu")
