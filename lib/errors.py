"""Errors of what was asked for, not of the code: the message says all, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LEAST = {"seed": 0, "rank": 0, "gcg": 0, "n_sealed": 4, "bits": 2}
LEAST |= dict.fromkeys(("n_prompts", "n_measured", "max_new_tokens", "n_levels", "groups", "budget", "steps"), 1)
ABOVE = {"useless": 1, "damage": 1, "factor": 0, "doses": 0, "learning_rate": 0}
MAY_BE_EMPTY = {"layers", "families", "attack_files", "models"}


class PlainError(Exception):
    """An error that a notebook shows as its one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython shows in place of a traceback; it asks every exception that has this method."""
        return [f"{type(self).__name__}: {self}"]


class ChoiceError(PlainError, ValueError):
    """A parameter whose value cannot be."""


def check(**parameters: Any) -> None:
    """ChoiceError for a notebook's parameter, given by name, whose number or list cannot be.

    The names of techniques, sites, layers and files are checked where they are used."""
    for name, value in parameters.items():
        if isinstance(value, list):
            _check_list(name, value)
        for one in value if isinstance(value, list) else [value]:
            if name in LEAST and not (isinstance(one, int) and one >= LEAST[name]):
                raise ChoiceError(f"{name} cannot be {one!r}; give a whole number from {LEAST[name]}")
            if name in ABOVE and not (isinstance(one, int | float) and one > ABOVE[name]):
                raise ChoiceError(f"{name} cannot be {one!r}; give a number above {ABOVE[name]}")
            if name == "tolerance" and not (isinstance(one, int | float) and 0 < one < 1):
                raise ChoiceError(f"tolerance cannot be {one!r}; give a share between 0 and 1: 0.05 for 5 points")


def _check_list(name: str, values: list[Any]) -> None:
    if not values and name not in MAY_BE_EMPTY:
        raise ChoiceError(f"{name} is empty; give at least one")
    if again := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ChoiceError(f"{name} has {again[0]!r} twice; give each once")


@contextmanager
def choosing() -> Iterator[None]:
    """Around code that checks what the reader chose: its ValueErrors, missing files and folders for files become
    ChoiceErrors."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError) as error:
        file, folder = getattr(error, "filename", None), isinstance(error, IsADirectoryError)
        plain = f"{file} is a folder, not a file" if folder else f"there is no file {file}"
        raise ChoiceError(plain if file else str(error)) from error
