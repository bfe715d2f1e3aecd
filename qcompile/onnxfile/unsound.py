"""The error between the checks of a model and whoever knows its file's name."""

from __future__ import annotations


class Unsound(Exception):
    """A model that no reader should see; the message is the rest of a sentence that begins with its name."""
