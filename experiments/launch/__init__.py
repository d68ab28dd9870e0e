"""Ways to start an experiment in several processes."""
