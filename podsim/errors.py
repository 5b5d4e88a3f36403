"""The one error a user can cause: the command line prints it as a single line and exits with 2."""

from __future__ import annotations


class InputError(ValueError):
    """A trace, a profile or an option that the user gave is wrong; the message says what to do."""
