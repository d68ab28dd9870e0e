"""Runs models over pools: programs, sampling, requests."""
