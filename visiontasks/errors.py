"""The one exception of our own, in a module that imports nothing, so that entry points can name it before torch."""


class UsageError(ValueError):
    """A mistake that the user can mend: one sentence with the value found, what was expected, and what to type."""
