"""Packs rBlocks into a buffer and unpacks them, in place."""
