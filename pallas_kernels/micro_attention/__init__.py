"""Attention of some queries over rBlocks held in one place."""
