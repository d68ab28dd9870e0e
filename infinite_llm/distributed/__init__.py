"""Mesh, processes and messages."""
