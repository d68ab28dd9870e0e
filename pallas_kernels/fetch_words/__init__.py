"""Fetches small arrays out of pinned host memory, past the copy engines."""
