"""What the demo tells a user instead of a traceback."""

from __future__ import annotations


class DemoError(Exception):
    """Something the user can put right; the message says what and how."""
