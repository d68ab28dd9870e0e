"""What a simulation finds."""


class ViolationError(Exception):
  """Something happened that must never happen."""
