"""Clusters without devices: a network, clocks and faults out of one seed."""
