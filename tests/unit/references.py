"""Exact activations, and forms and recipes of the papers that the systems' constants are checked against."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lib.approximations.technique import evaluate_polynomial


def gelu_erf(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def nexus_exact_sign(x: Tensor, even: tuple[float, ...], cut_off: float) -> Tensor:
    """NEXUS's form with an exact sign in place of the polynomial one."""
    b0, b1 = torch.sign(x + cut_off) / 2, torch.sign(x - cut_off) / 2
    return (b0 - b1) * (evaluate_polynomial(even, x * x) + x / 2) + (b1 + 0.5) * x


def even_fit(function: object, cut_off: float) -> np.ndarray:
    """NEXUS's recipe: least squares on 1, x^2, ..., x^12 over 1000 uniform points, fitted in x / T."""
    t = np.linspace(-1, 1, 1000)
    target = function(torch.tensor(t * cut_off)).numpy() - t * cut_off / 2  # type: ignore[operator]
    solution = np.linalg.lstsq(np.vander(t * t, 7, increasing=True), target, rcond=None)[0]
    return solution / cut_off ** (2 * np.arange(7))
