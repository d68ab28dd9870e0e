"""What the README shows does what it says."""

import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_library_example_prints_what_it_says(tmp_path):
  readme = (_ROOT / "README.md").read_text()
  code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
  said = re.search(r"print\(output\.text\)  # (.*)", code)[1]
  # Its tokens are counted in the text below it.
  code += "print(len(output.prompt_token_ids))\n"
  code += "print(llm.engine.config.cache.capacity_tokens)\n"
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env={"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  text, num_tokens, capacity = done.stdout.splitlines()
  assert text == said
  assert f"has {int(num_tokens):,} tokens" in readme
  assert f"room for {int(capacity):,}." in readme
