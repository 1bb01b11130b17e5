"""One pass over calibration text that serves every technique, block by block, kept on disk by content.

Per layer: TEAL's histograms of the sites that are sparsified, the largest |x| per channel for smoothing, the largest
|W| per input channel, the mean squares of norm inputs. Dense hidden states flow from block to block, so that memory
holds one block's activations at a time (as in TEAL's and OmniQuant's own calibration).
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.anatomy import FINAL, anatomy, expand_sites, text_config
from lib.approximations import omniquant, teal
from lib.approximations.technique import State, Step, Technique
from lib.errors import PlainError
from lib.generation import NonFiniteError
from lib.models import weights_hash
from lib.patching import approximated, observed
from lib.paths import atomic, cache_folder
from lib.results import content_key, source_hash

log = logging.getLogger(__name__)

HISTOGRAM_SITES = ("attn_in", "attn_out", "mlp_in", "act", "mlp_mid")
CHANNEL_SITES = ("attn_in", "attn_out", "mlp_in", "gate", "mlp_mid", "q", "k", "v")
WINDOW, WINDOWS = 2048, 10  # TEAL: 20,480 tokens in windows of 2,048
SHORT_WINDOWS = 64  # for models whose window is short
MIN_TOKENS = 2048  # fewer leave a 10,000-bin histogram of the hidden channels unstable
TOKENS_PER_PASS = 8192
GREEDY_TOKENS, TRAINING_WINDOWS = 512, 16
DAMAGED = "calibration cache %s is damaged (%s): computing it again"
CODE = ("lib.calibration", "lib.anatomy", "lib.patching", "lib.approximations.teal")


class CalibrationError(PlainError, ValueError):
    """The calibration text is unfit; the message says how much is needed."""


def calibrate(technique: Technique, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> State | None:
    """The technique's state for this model from these texts; None if it needs none. Cached under data/cache.

    NonFiniteError where its training diverges."""
    if not technique.needs_calibration:
        return None
    ids = windows(tokenizer, texts, window_length(model))
    code = source_hash(*CODE, "lib.approximations.smoothquant", type(technique).__module__)
    key = content_key([weights_hash(model), ids.tolist(), technique.name, technique.settings, code])
    path = cache_folder() / "states" / f"{key}.safetensors"
    try:
        return _cached(path, lambda: technique.fit(Calibration(model, ids)))
    except FloatingPointError as error:
        raise NonFiniteError(str(error)) from error


def _cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A file's tensors; where there is no file, or a damaged one, they are computed and written."""
    try:
        if path.is_file():
            return load_file(path)
    except SafetensorError as error:
        log.warning(DAMAGED, path.name, error)
    tensors = compute()
    with atomic(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
    return load_file(path)


def window_length(model: nn.Module) -> int:
    """Tokens per calibration window: 2,048, or half the positions of a model with fewer than 4,096."""
    return min(WINDOW, text_config(model).max_position_embeddings // 2)


def windows(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """The texts' tokens one after the other, cut into windows [windows, length]; CalibrationError if too few."""
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    needed = max(MIN_TOKENS, length)
    if len(ids) < needed:
        raise CalibrationError(f"calibration text has {len(ids)} tokens; stable thresholds need at least {needed}")
    count = min(len(ids) // length, WINDOWS if length == WINDOW else SHORT_WINDOWS)
    return torch.tensor(ids[: count * length]).view(count, length)


class _Start(NamedTuple):
    """What enters block 0 [windows, length, hidden], and each block's keyword arguments (masks, positions) in the first
    batch, which all batches share."""

    states: Tensor
    keywords: dict[int, dict[str, Any]]


class Calibration:
    """Statistics of one model on one set of windows [windows, length]; see `approximations.technique.Statistics`."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.body = model, anatomy(model)
        config = text_config(model)
        self.n_layers = len(self.body.blocks)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.ids, self.batch = ids, max(1, TOKENS_PER_PASS // ids.shape[1])
        self._rounded: list[Tensor] = []
        self._dense: tuple[int, Tensor] | None = None
        key = content_key([weights_hash(model), ids.tolist(), source_hash(*CODE)])
        self._path = cache_folder() / "statistics" / key
        self._tensors = _cached(self._path.with_suffix(".safetensors"), self._measured)

    def histogram(self, layer: int, site: str) -> tuple[Tensor, Tensor]:
        return self._tensors[f"{layer}.{site}.centers"], self._tensors[f"{layer}.{site}.counts"]

    def channel_max(self, layer: int, site: str) -> Tensor:
        return self._tensors[f"{layer}.{site}.max"]

    def mean_square(self, layer: int, site: str) -> tuple[float, float]:
        low, high = self._tensors[f"{layer}.{site}.mean_square"].tolist()
        return low, high

    def weight_max(self, layer: int, projection: str) -> Tensor:
        block = self.body.blocks[layer]
        if projection in block.projections:
            return block.projections[projection].weight.detach().abs().amax(0).float().cpu()
        experts = block.experts
        half = experts.gate_up_proj.shape[1] // 2
        parts = {"gate": experts.gate_up_proj[:, :half], "up": experts.gate_up_proj[:, half:]}
        return parts.get(projection, experts.down_proj).detach().abs().amax((0, 1)).float().cpu()

    def greedy_trace(self, layer: int) -> teal.Trace:
        """TEAL's search on this block, with dense inputs; its error is read off the block's real output."""
        path = self._path.with_suffix(f".greedy{layer}.json")
        try:
            if path.is_file():
                stored = json.loads(path.read_text())
                return teal.Trace(**stored | {k: tuple(stored[k]) for k in ("order", "errors")})
        except (ValueError, KeyError, TypeError) as error:
            log.warning(DAMAGED, path.name, error)
        sizes = self._relative_sizes(layer)
        inputs = self.dense_inputs(layer)[: max(1, GREEDY_TOKENS // self.ids.shape[1])]
        reference = self.run_block(layer, inputs)

        def block_error(sparsities: dict[str, float]) -> float:
            state = teal.layer_thresholds(self, layer, sparsities)
            with approximated(self.model, teal.Teal(), state, layers=[layer]):
                return float(teal.activation_error(self.run_block(layer, inputs), reference))

        trace = teal.greedy_allocation(block_error, sizes)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(asdict(trace)))
        return trace

    def _relative_sizes(self, layer: int) -> dict[str, float]:
        """Parameters of each projection, in units of q's."""
        projections = self.body.blocks[layer].projections
        if set(teal.SITES) - set(projections):
            raise CalibrationError("teal: allocation='greedy' needs blocks of seven linear layers; choose uniform")
        return {name: projections[name].weight.numel() / projections["q"].weight.numel() for name in teal.SITES}

    def train_scales(self, layer: int, technique: Technique, initial: dict[str, Tensor]) -> dict[str, Tensor]:
        """OmniQuant's scales of this block: inputs from the rounded blocks before it, targets from the dense one."""
        assert isinstance(technique, omniquant.OmniQuant)
        dense = self.dense_inputs(layer)[:TRAINING_WINDOWS]
        if layer == 0:
            self._rounded = list(dense.split(1))

        def rounded(scales: dict[str, Tensor], x: Tensor) -> Tensor:
            state = {f"{layer}.{name}": value for name, value in scales.items()}
            with approximated(self.model, technique, state, layers=[layer]):
                return self._forward(layer, x)

        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        try:
            scales = omniquant.train_block(
                rounded,
                initial,
                self._rounded,
                list(self.run_block(layer, dense).split(1)),
                [self.run_block(layer, x) for x in self._rounded] if technique.aug_loss else None,
                epochs=technique.epochs,
                learning_rate=technique.learning_rate,
                block=f"block {layer}",
            )
            with torch.no_grad():
                self._rounded = [rounded(scales, x) for x in self._rounded]
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
        return scales

    def dense_inputs(self, layer: int) -> Tensor:
        """Hidden states [windows, length, hidden] that enter a block of the exact model."""
        at, states = self._dense if self._dense and self._dense[0] <= layer else (0, self._start.states)
        for block in range(at, layer):
            states = self.run_block(block, states)
        self._dense = (layer, states)
        return states

    @torch.no_grad()
    def run_block(self, layer: int, inputs: Tensor) -> Tensor:
        """The block's output [windows, length, hidden] for its inputs, `self.batch` windows at a time."""
        return torch.cat([self._forward(layer, part) for part in inputs.split(self.batch)])

    def _forward(self, layer: int, x: Tensor) -> Tensor:
        """The same for at most `self.batch` windows at once, with gradients."""
        block = self.body.blocks[layer].module
        keywords = {name: _first_rows(value, len(x)) for name, value in self._start.keywords[layer].items()}
        output = block(x, **keywords)
        return output[0] if isinstance(output, tuple) else output

    @cached_property
    @torch.no_grad()
    def _start(self) -> _Start:
        inputs: list[Tensor] = []
        keywords: dict[int, dict[str, Any]] = {}

        def note(layer: int) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                if layer == 0:
                    inputs.append(args[0] if args else kwargs["hidden_states"])
                keywords.setdefault(layer, {k: v for k, v in kwargs.items() if k != "hidden_states"})

            return hook

        blocks = [block.module for block in self.body.blocks]
        handles = [b.register_forward_pre_hook(note(i), with_kwargs=True) for i, b in enumerate(blocks)]
        try:
            for part in self.ids.split(self.batch):
                self.model(input_ids=part.to(self.model.device), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return _Start(torch.cat(inputs), keywords)

    def _measured(self) -> dict[str, Tensor]:
        """Every statistic of every layer, by "layer.site.name"."""
        tensors: dict[str, Tensor] = {}
        states = self._start.states
        for layer in tqdm(range(self.n_layers), desc="calibration", leave=False, disable=self.n_layers < 2):
            states = self._measure(layer, states, tensors)
        tensors[f"{FINAL}.norm_final.mean_square"] = _extremes(states)
        return tensors

    def _measure(self, layer: int, inputs: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Adds one layer's statistics to `tensors`; returns the block's output."""
        values: dict[str, list[Tensor]] = defaultdict(list)
        squares: dict[str, list[Tensor]] = defaultdict(list)

        def read(at: int, site: str, x: Tensor, step: Step) -> None:
            values[site].append(x.reshape(-1, x.shape[-1]))

        norms = self.body.blocks[layer].norms.items()
        handles = [
            norm.register_forward_pre_hook(lambda _, args, site=site: squares[site].append(_extremes(args[0])))
            for site, norm in norms
        ]
        try:
            sites = dict.fromkeys((*HISTOGRAM_SITES, *CHANNEL_SITES))
            with observed(self.model, [s for s in sites if expand_sites(self.body.blocks[layer], s)], read):
                outputs = self.run_block(layer, inputs)
        finally:
            for handle in handles:
                handle.remove()
        for site, parts in squares.items():
            both = torch.stack(parts)
            tensors[f"{layer}.{site}.mean_square"] = torch.stack([both[:, 0].min(), both[:, 1].max()])
        for site, chunks in values.items():
            x = torch.cat(chunks)
            if site in HISTOGRAM_SITES:
                tensors[f"{layer}.{site}.centers"], tensors[f"{layer}.{site}.counts"] = teal.histogram(x)
            if site in CHANNEL_SITES:
                tensors[f"{layer}.{site}.max"] = x.abs().amax(0).float()
        return outputs


def _extremes(x: Tensor) -> Tensor:
    """[2]: smallest and largest mean square over the last dimension."""
    squares = x.detach().float().square().mean(-1)
    return torch.stack([squares.min(), squares.max()])


def _first_rows(value: Any, rows: int) -> Any:
    """Keyword arguments for a smaller batch: tensors and tuples of tensors cut to `rows` where they have more."""
    if isinstance(value, tuple):
        return tuple(_first_rows(part, rows) for part in value)
    return value[:rows] if isinstance(value, Tensor) and value.ndim > 1 and len(value) > rows else value
