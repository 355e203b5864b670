"""The one exception that a command turns into a sentence and exit code 2."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something the user can mend; the message names the thing and the mend in one sentence."""


def package(name: str, needed_by: str) -> ModuleType:
    """Import an optional package. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs a package that is not here ({error}); pip install "
            f"{name.replace('_', '-')}."
        ) from error


def reason(error: Exception) -> str:
    """What a library's error says, short enough for a sentence."""
    return short(str(error).strip() or type(error).__name__, 300)


def short(text: str, width: int) -> str:
    """A text on one line, cut after `width` letters: textwrap's drops a long word whole."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width]}…"
