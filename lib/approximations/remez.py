"""Minimax polynomials by Remez exchange.

p minimises max |p(y) - f(y)| on [0, T] over polynomials of one degree. At the optimum the error takes its largest
value with alternating sign at degree + 2 points (Chebyshev), so each step solves for the polynomial whose error
alternates with equal size on a reference set, then moves the references to the extrema of that error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GRID = 40_001
MAX_EXCHANGES = 100


def minimax(function: Callable[[Array], Array], upper: float, degree: int) -> tuple[Array, float]:
    """(coefficients [degree + 1] of 1, t, t^2, ... in t = y / upper, levelled error) for f(y), y in [0, upper].

    ArithmeticError where the error does not alternate often enough."""
    grid = (1 - np.cos(np.pi * np.arange(GRID) / (GRID - 1))) / 2
    target = function(grid * upper)
    reference = np.round(np.linspace(0, GRID - 1, degree + 2)).astype(int)
    alternating = (-1.0) ** np.arange(degree + 2)
    for _ in range(MAX_EXCHANGES):
        system = np.column_stack((np.vander(grid[reference], degree + 1, increasing=True), alternating))
        *coefficients, level = np.linalg.solve(system, target[reference])
        error = target - np.polyval(coefficients[::-1], grid)
        changes = np.flatnonzero(np.diff(np.sign(error)) != 0) + 1
        pieces = np.split(np.arange(GRID), changes)  # of one sign each, so that their extrema alternate
        extrema = np.array([piece[np.argmax(np.abs(error[piece]))] for piece in pieces])
        while len(extrema) > degree + 2:
            first_is_smaller = abs(error[extrema[0]]) < abs(error[extrema[-1]])
            extrema = extrema[1:] if first_is_smaller else extrema[:-1]
        if len(extrema) < degree + 2:
            raise ArithmeticError(f"Remez exchange found {len(extrema)} alternating extrema, {degree + 2} are needed")
        if np.array_equal(extrema, reference):
            break
        reference = extrema
    return np.array(coefficients), abs(float(level))
