"""Gives every test four CPU devices and exact float32 products.

Tests marked `gpu` need `JAX_PLATFORMS=cuda`; without it nobody looks for a GPU.
"""

import os

import jax

# Threads of XLA's pool. An interpreted kernel's warpgroups wait for each other
# in one thread each; with fewer threads than those they wait for ever.
os.environ.setdefault("NPROC", "8")

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
