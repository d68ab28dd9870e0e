"""Gives every test four CPU devices and exact float32 products.

Tests marked `gpu` need `JAX_PLATFORMS=cuda`; without it nobody looks for a GPU.
Drawn examples are the same in every run, and may take as long as they do.
"""

import atexit
import os
import shutil
import tempfile

import hypothesis
import jax

# Threads of XLA's pool. An interpreted kernel's warpgroups wait for each other
# in one thread each; with fewer threads than those they wait for ever.
os.environ.setdefault("NPROC", "16")

# Many tests compile the same programs: all processes of a run share them, and
# the next run begins anew.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  folder = tempfile.mkdtemp(prefix="jax-cache-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
jax.config.update(
  "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
  "repeatable",
  derandomize=True,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")
