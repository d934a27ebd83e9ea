"""The error of a user's mistake. The command prints its sentence and exits with status 2."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can correct: one sentence naming field, value, rule and remedy."""
