"""Other ways to attend a context that lies on many instances, to compare."""
