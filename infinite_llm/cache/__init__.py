"""rBlocks: books on the host, pools on the devices, movement between them."""
