"""One pass over calibration text that serves every technique, block by block, kept on disk by content.

Per layer: TEAL's histograms of the sites that are sparsified, the largest |x| per channel for smoothing, the largest
|W| per input channel, the mean squares of norm inputs. Dense hidden states flow from block to block, so that memory
holds one block's activations at a time (as in TEAL's and OmniQuant's own calibration).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.anatomy import FINAL, anatomy, expand_sites, text_config
from lib.approximations.plan import Plan
from lib.approximations.teal import histogram
from lib.approximations.technique import State, Step, Technique
from lib.errors import ChoiceError, choosing
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
CODE = ("lib.calibration", "lib.anatomy", "lib.patching", "lib.eager", "lib.approximations.teal")


def calibrate(
    technique: Technique, model: nn.Module, tokenizer: Any, texts: Sequence[str], weights: str | None = None
) -> State | None:
    """The technique's state for this model from these texts; None if it needs none. Cached under data/cache, of a plan
    each technique's by itself. weights: the hash of the model's weights, where it is known.

    ChoiceError for too little text, or a setting that this model cannot have. NonFiniteError where its training
    diverges."""
    if not technique.needs_calibration:
        return None
    weights = weights or weights_hash(model)
    if isinstance(technique, Plan):
        return technique.joined([calibrate(one, model, tokenizer, texts, weights) for one, _ in technique.groups])
    ids = windows(tokenizer, texts, window_length(model))
    code = source_hash(*CODE, "lib.approximations.smoothquant", type(technique).__module__)
    key = content_key([weights, ids.tolist(), technique.name, technique.settings, code])
    path = cache_folder() / "states" / f"{key}.safetensors"
    try:
        with choosing():
            return _cached(path, lambda: technique.fit(Calibration(model, ids, weights)))
    except FloatingPointError as error:
        raise NonFiniteError(str(error)) from error


def _cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A file's tensors; where there is no file, or a damaged one, they are computed and written."""
    try:
        if path.is_file():
            return load_file(path)
    except SafetensorError as error:
        log.warning("calibration cache %s is damaged (%s): computing it again", path.name, error)
    tensors = compute()
    with atomic(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
    return load_file(path)


def window_length(model: nn.Module) -> int:
    """Tokens per calibration window: 2,048, or half the positions of a model with fewer than 4,096."""
    return min(WINDOW, text_config(model).max_position_embeddings // 2)


def windows(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """The texts' tokens one after the other, cut into windows [windows, length]; ChoiceError if too few."""
    count = WINDOWS if length == WINDOW else SHORT_WINDOWS
    needed = max(MIN_TOKENS, length)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= max(needed, count * length):
            break
    if len(ids) < needed:
        raise ChoiceError(f"calibration text has {len(ids)} tokens; stable thresholds need at least {needed}")
    count = min(len(ids) // length, count)
    return torch.tensor(ids[: count * length]).view(count, length)


class Calibration:
    """Statistics of one model on one set of windows [windows, length]; see `approximations.technique.Statistics`.

    weights: the hash of the model's weights, where it is known.
    """

    def __init__(self, model: nn.Module, ids: Tensor, weights: str | None = None) -> None:
        self.model, self.body = model, anatomy(model)
        config = text_config(model)
        self.n_layers = len(self.body.blocks)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.ids, self.batch = ids, max(1, TOKENS_PER_PASS // ids.shape[1])
        self._dense: tuple[int, Tensor] | None = None
        key = content_key([weights or weights_hash(model), ids.tolist(), source_hash(*CODE)])
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
        if projection == "router":
            if block.router is None:
                raise KeyError(projection)
            return block.router.weight.detach().abs().amax(0).float().cpu()
        experts = block.experts
        half = experts.gate_up_proj.shape[1] // 2
        parts = {"gate": experts.gate_up_proj[:, :half], "up": experts.gate_up_proj[:, half:]}
        return parts.get(projection, experts.down_proj).detach().abs().amax((0, 1)).float().cpu()

    def parameters(self, layer: int) -> dict[str, int]:
        return {name: one.weight.numel() for name, one in self.body.blocks[layer].projections.items()}

    def kept(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return _cached(self._path.with_suffix(f".{name}.safetensors"), compute)

    @torch.no_grad()
    def dense_inputs(self, layer: int) -> Tensor:
        """Hidden states [windows, length, hidden] that enter a block of the exact model."""
        at, states = self._dense if self._dense and self._dense[0] <= layer else (0, self._start[0])
        for block in range(at, layer):
            states = self.run_block(block, states)
        self._dense = (layer, states)
        return states

    def run_block(
        self, layer: int, inputs: Tensor, technique: Technique | None = None, state: State | None = None
    ) -> Tensor:
        """The block's output [windows, length, hidden] for its inputs, `self.batch` windows at a time."""
        block, keywords = self.body.blocks[layer].module, self._start[1][layer]
        with approximated(self.model, technique, state, layers=[layer]) if technique else nullcontext():
            outputs = [
                block(x, **{name: _first_rows(value, len(x)) for name, value in keywords.items()})
                for x in inputs.split(self.batch)
            ]
        return torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs])

    @cached_property
    @torch.no_grad()
    def _start(self) -> tuple[Tensor, dict[int, dict[str, Any]]]:
        """What enters block 0 [windows, length, hidden], and each block's keyword arguments (masks, positions) in the
        first batch, which all batches share."""
        inputs: list[Tensor] = []
        keywords: dict[int, dict[str, Any]] = {}

        def note(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
            if layer == 0:
                inputs.append(args[0] if args else kwargs["hidden_states"])
            keywords.setdefault(layer, {k: v for k, v in kwargs.items() if k != "hidden_states"})

        with ExitStack() as hooks:
            for block in self.body.blocks:
                hook = partial(note, block.index)
                hooks.enter_context(block.module.register_forward_pre_hook(hook, with_kwargs=True))
            for part in self.ids.split(self.batch):
                self.model(input_ids=part.to(self.model.device), use_cache=False, logits_to_keep=1)
        return torch.cat(inputs), keywords

    @torch.no_grad()
    def _measured(self) -> dict[str, Tensor]:
        """Every statistic of every layer, by "layer.site.name"."""
        tensors: dict[str, Tensor] = {}
        states = self._start[0]
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

        def note(site: str, module: nn.Module, args: tuple) -> None:
            squares[site].append(_extremes(args[0]))

        block = self.body.blocks[layer]
        sites = [s for s in dict.fromkeys((*HISTOGRAM_SITES, *CHANNEL_SITES)) if expand_sites(block, s)]
        with ExitStack() as hooks, observed(self.model, sites, read):
            for site, norm in block.norms.items():
                hooks.enter_context(norm.register_forward_pre_hook(partial(note, site)))
            outputs = self.run_block(layer, inputs)
        for site, parts in squares.items():
            both = torch.stack(parts)
            tensors[f"{layer}.{site}.mean_square"] = torch.stack([both[:, 0].min(), both[:, 1].max()])
        for site, chunks in values.items():
            x = torch.cat(chunks)
            if site in HISTOGRAM_SITES:
                tensors[f"{layer}.{site}.centers"], tensors[f"{layer}.{site}.counts"] = histogram(x)
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
