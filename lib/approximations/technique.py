"""What every technique is: settings, the places it touches, and the tensor functions it puts there.

A technique changes a forward pass in two ways. A *transform* edits the tensor found at a site (sparsify, quantize, add
noise). An *operation* replaces how a non-linear function is computed (a polynomial SiLU, a fixed-point softmax). Both
are plain tensor functions: techniques never see a model. `lib.patching` puts them in place and takes them out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""Calibrated tensors by name, e.g. `"3.mlp_in.up"`: layer, then site. Saved as safetensors."""

OPERATIONS = ("activation", "softmax", "norm")


@dataclass(frozen=True)
class Step:
    """What a transform may know about the forward pass it runs in.

    real: bool [batch, seq], False at left padding; seq counts the tokens of this pass only.
    prefill: True while the prompt is read (or plain text is scored), False when one new token is decoded.
    late: bool like real, where it cannot be told from real; see `second_half`.
    """

    real: Tensor
    prefill: bool
    late: Tensor | None = None

    @property
    def second_half(self) -> Tensor:
        """bool like real: the last floor(n / 2) of the n real tokens of a row."""
        if self.late is not None:
            return self.late
        rank, length = self.real.cumsum(-1), self.real.sum(-1, keepdim=True)
        return self.real & (rank > length - length // 2)

    def at(self, tokens: Tensor) -> Step:
        """This step for the chosen tokens [n] of the flattened batch, as a mixture's expert sees them: [1, n]."""
        return Step(self.real.reshape(1, -1)[:, tokens], self.prefill, self.second_half.reshape(1, -1)[:, tokens])


class Statistics(Protocol):
    """What one calibration pass measured (see `lib.calibration`). Layers count from 0."""

    n_layers: int
    head_dim: int

    def histogram(self, layer: int, site: str) -> tuple[Tensor, Tensor]:
        """(centers [bins], counts [bins]) of attn_in, attn_out, mlp_in, act or mlp_mid, all channels pooled."""

    def channel_max(self, layer: int, site: str) -> Tensor:
        """max |x| per channel [channels] of attn_in, attn_out, mlp_in, gate, mlp_mid, q, k or v."""

    def weight_max(self, layer: int, projection: str) -> Tensor:
        """max |W| per input channel [in] of q, k, v, o, gate, up, down or router; KeyError where there is no router."""

    def mean_square(self, layer: int, site: str) -> tuple[float, float]:
        """(smallest, largest) mean square over channels of a norm's input, e.g. norm_attn; final norm: layer -1."""

    def parameters(self, layer: int) -> dict[str, int]:
        """Number of weights of each of the block's linear projections by name; those of experts are left out."""

    def dense_inputs(self, layer: int) -> Tensor:
        """Hidden states [windows, length, hidden] that enter this block of the exact model."""

    def run_block(
        self, layer: int, inputs: Tensor, technique: Technique | None = None, state: State | None = None
    ) -> Tensor:
        """The real block's output [windows, length, hidden] for its inputs, exact or with a technique."""

    def kept(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` gives, from disk where it was computed before for the same model and text."""


Transform = Callable[[Tensor, Step], Tensor]


@dataclass(frozen=True)
class Technique:
    """Base of all techniques; fields of the subclasses are their settings.

    name, category: as in the vocabulary of the project.
    per_token: whether a token's result depends on that token alone, so that batching cannot change it.
    """

    name: ClassVar[str]
    category: ClassVar[str]

    @property
    def per_token(self) -> bool:
        return True

    @property
    def whole_prompt(self) -> bool:
        """Whether a token's result depends on its prompt's length, so that a prompt must be read in one pass."""
        return False

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites this technique transforms, projection-level where it matters: `mlp_in.up`."""
        return ()

    @property
    def operations(self) -> tuple[str, ...]:
        """Operations this technique replaces, of `OPERATIONS`."""
        return ()

    @property
    def needs_calibration(self) -> bool:
        return False

    def split(self, layers: Iterable[int] | None) -> list[tuple[Technique, Iterable[int] | None]]:
        """(technique, layers) pairs that together are this one in `layers`: itself, unless it is a plan."""
        return [(self, layers)]

    def transform(self, site: str, layer: int, state: State | None) -> Transform:
        """x [batch, seq, channels], step -> x, for one of `sites`. ValueError where there are none."""
        raise ValueError(f"{self.name} transforms no site")

    def operation(self, operation: str, layer: int, state: State | None, site: str = "") -> Callable[..., Tensor]:
        """The replacement for one of `operations`; `site` says which of a block's norms, e.g. norm_attn.

        activation: f(x, kind) with kind "silu", "gelu" or "gelu_tanh".
        softmax: f(scores [..., query, key], visible bool, broadcastable) -> probabilities, 0 where not visible.
        norm: f(x [..., channels], eps) -> x / sqrt(mean(x^2) + eps), without the learned weight. The final norm has
        layer -1 and site norm_final. ValueError where there are no `operations`.
        """
        raise ValueError(f"{self.name} replaces no operation")

    def fit(self, statistics: Statistics) -> dict[str, Tensor]:
        """State from one calibration pass. ValueError for a technique without `needs_calibration`."""
        raise ValueError(f"{self.name} needs no calibration")

    def calibrate(self, model: Any, tokenizer: Any, texts: list[str]) -> State | None:
        """State from calibration texts, or None where the technique needs none."""
        from lib import calibration  # the one look upward: a convenience for readers, see docs/methods.md

        return calibration.calibrate(self, model, tokenizer, texts)

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)


def check_choice(technique: str, name: str, value: object, valid: tuple[object, ...]) -> None:
    """ValueError that names the bad value and lists the valid ones; 12.0 is not the whole number 12."""
    if value not in valid or (isinstance(value, float) and all(isinstance(one, int) for one in valid)):
        raise ValueError(f"{technique}: {name}={value!r} is not valid; choose one of {', '.join(map(str, valid))}")


def calibrated(technique: str, state: State | None, key: str) -> Tensor:
    """state[key], or ValueError that says what is missing."""
    if state is None or key not in state:
        raise ValueError(f"{technique}: no calibrated value for {key}; pass the state that technique.calibrate returns")
    return state[key]


def evaluate_polynomial(coefficients: tuple[float, ...], x: Tensor, out: Tensor | None = None) -> Tensor:
    """c0 + c1 x + ... by Horner's rule, in the dtype of x, one operation per degree. Carries no gradient.

    out: a tensor like x to write into, never x itself.
    """
    *lower, second, _ = _scalars(coefficients, x.dtype, x.device)
    with torch.no_grad():
        result = torch.add(second, x, alpha=coefficients[-1], out=out)
        for coefficient in reversed(lower):
            torch.addcmul(coefficient, result, x, out=result)
    return result


@lru_cache(maxsize=256)
def _scalars(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Tensors without dimensions, made once: small tensors cost more to make than to compute with."""
    return torch.tensor(values, dtype=dtype, device=device).unbind()
