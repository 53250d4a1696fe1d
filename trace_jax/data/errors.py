"""The error of everything that reads text."""


class DataError(ValueError):
    """Text that can't be used. The message names file and line, what was expected, and what to do."""
