"""DistAttention: attention where the rBlocks are."""
