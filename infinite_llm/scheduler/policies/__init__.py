"""Pure functions from a view of the cluster to decisions."""
