"""Config files of experiments; each has `get_config()`."""
