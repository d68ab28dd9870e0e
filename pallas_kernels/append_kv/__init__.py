"""Writes new keys and values into rBlocks, in place."""
