"""The one error a user can cause: the command line prints it as a single line and exits with 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave (a trace, a profile, an option) is wrong; the message says what to do."""
