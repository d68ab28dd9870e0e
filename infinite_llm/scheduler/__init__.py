"""The control plane: plain Python, no JAX."""
