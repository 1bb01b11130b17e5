"""Errors of what was asked for, not of the code: the message says all, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PlainError(Exception):
    """An error that a notebook shows as its one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython shows in place of a traceback; it asks every exception that has this method."""
        return [f"{type(self).__name__}: {self}"]


class ChoiceError(PlainError, ValueError):
    """A parameter whose value cannot be."""


def at_least(least: int, **values: object) -> None:
    """ChoiceError for a parameter, given by name, that is no whole number from `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            raise ChoiceError(f"{name} cannot be {value!r}; give a whole number from {least}")


@contextmanager
def choosing() -> Iterator[None]:
    """Around code that checks what the reader chose: its ValueErrors, missing files and folders for files become
    ChoiceErrors."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError) as error:
        raise ChoiceError(str(error)) from error
