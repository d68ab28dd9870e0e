"""Experiments: one file each, all run through `experiments.run`."""
