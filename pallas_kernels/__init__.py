"""Device kernels: arrays in, arrays out; knows nothing of serving."""
