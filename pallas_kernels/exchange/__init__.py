"""Small exchanges between devices of one process, within a kernel."""
