"""approximated(model, technique, layers=...): put a technique's tensor functions in place, count them, take them out.

Everything is a PyTorch hook or one of Transformers' registered attention and expert functions, so no weight, forward
method or buffer is ever touched: on exit, also after an exception, the model is bit for bit what it was. Where tensors
are edited: see `lib.anatomy`. The final norm (layer -1) is treated together with the last block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib.anatomy import (
    ATTENTION_SITES,
    EXPERT_SITES,
    FINAL,
    NORM_SITES,
    READERS,
    SCALED_BEFORE_CAST,
    Anatomy,
    Block,
    anatomy,
    expand_sites,
    norm_parts,
)
from lib.approximations.technique import OPERATIONS, State, Step, Technique
from lib.eager import ATTRIBUTE, NAME, edits_of

Edit = Callable[[Tensor, Step], Tensor]


@dataclass
class Hits:
    """How often each (layer, site) was edited, and how many forward passes ran."""

    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    forwards: int = 0

    def silent(self) -> list[tuple[int, str]]:
        """Places that were patched but never reached."""
        return sorted(place for place, count in self.counts.items() if count == 0)


@contextmanager
def approximated(
    model: nn.Module, technique: Technique, state: State | None = None, layers: Iterable[int] | None = None
) -> Iterator[Hits]:
    """Runs the model with `technique`, or a plan of several, in `layers` (all by default); yields the hit counts.

    Raises ValueError for a layer the model does not have, for layers in which the technique changes nothing, a missing
    state, or a site that matches nothing; TypeError for a technique's name.
    """
    if not isinstance(technique, Technique):
        raise TypeError(f"{technique!r} is no technique; make one with lib.approximations.make")
    if technique.needs_calibration and state is None:
        raise ValueError(f"{technique.name} needs calibration: pass state=technique.calibrate(model, tokenizer, texts)")
    if state is not None:  # a copy from the host in every step would make it wait, and no CUDA graph can hold one
        device = next(model.parameters()).device
        state = {key: value.to(device) for key, value in state.items()}
    body = anatomy(model)
    if layers is not None:
        layers = check_layers(layers, len(body.blocks))
    parts = [(part, check_layers(chosen, len(body.blocks))) for part, chosen in technique.split(layers)]
    with ExitStack() as undo:
        patch = _Patch(model, body, undo, technique)
        for part, chosen in parts:
            blocks = [body.blocks[layer] for layer in chosen]
            for operation in part.operations:
                _place_operation(patch, blocks, operation, part, state)
            for site in part.sites:
                _place_site(patch, blocks, site, partial(part.transform, state=state))
        if technique.split(None) and not patch.hits.counts:  # an empty plan may change nothing
            raise ValueError(f"{technique.name} changes nothing in layers {', '.join(map(str, layers or parts[0][1]))}")
        patch.engage()
        yield patch.hits


@contextmanager
def observed(model: nn.Module, sites: Iterable[str], read: Callable[[int, str, Tensor, Step], None]) -> Iterator[Hits]:
    """Calls read(layer, site, tensor, step) wherever the model computes one of `sites`; changes nothing."""

    def reader(site: str, layer: int) -> Edit:
        def look(x: Tensor, step: Step) -> Tensor:
            read(layer, site, x.detach(), step)
            return x

        return look

    with ExitStack() as undo:
        body = anatomy(model)
        patch = _Patch(model, body, undo)
        for site in sites:
            _place_site(patch, list(body.blocks), site, reader)
        patch.engage()
        yield patch.hits


def engaged(model: nn.Module) -> list[tuple[Technique | None, Hits]]:
    """(technique, hits) of every patch that is on the model now; technique None where it only observes."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    patches = [getattr(hook, "__self__", None) for hook in hooks]
    return [(patch.technique, patch.hits) for patch in patches if isinstance(patch, _Patch)]


def check_layers(layers: Iterable[int] | None, n_layers: int) -> list[int]:
    """Sorted layer numbers; ValueError names those outside 0 .. n_layers - 1 and an empty choice."""
    chosen = set(range(n_layers) if layers is None else layers)
    outside = [layer for layer in chosen if layer not in range(n_layers)]
    if outside or not chosen:
        raise ValueError(f"layers {outside or 'none'} are not valid; this model has layers 0 to {n_layers - 1}")
    return sorted(chosen)


def first_non_finite(model: nn.Module, forward: Callable[[], Any]) -> tuple[int, str] | None:
    """The first (layer, site) with a NaN or infinity while `forward` runs the model as it is now, or None."""
    found: list[tuple[int, str]] = []

    def look(layer: int, site: str, x: Tensor, step: Step) -> None:
        if not torch.isfinite(x[step.real]).all():
            found.append((layer, site))

    sites = [s for s in ("norm_attn", "attn_out", "norm_mlp", "act", "mlp_mid", "block_out") if _exists(model, s)]
    with torch.no_grad(), observed(model, [*sites, "norm_final"], look):
        forward()
    return found[0] if found else None


def _exists(model: nn.Module, site: str) -> bool:
    """Whether every block has the site where a hook reaches it: inside experts it would displace the technique's."""
    blocks = anatomy(model).blocks
    return all(expand_sites(block, site) and (block.experts is None or site not in EXPERT_SITES) for block in blocks)


class _Patch:
    """Collects edits by place, then engages them; everything it does is undone by the ExitStack."""

    def __init__(self, model: Any, body: Anatomy, undo: ExitStack, technique: Technique | None = None) -> None:
        self.model, self.body, self.undo, self.technique, self.hits = model, body, undo, technique, Hits()
        self.step: Step | None = None
        self.fused: dict[nn.Linear, dict[tuple[str, int, int], Edit]] = {}
        self.attention: dict[nn.Module, dict[str, Callable]] = {}
        self.experts: dict[nn.Module, dict[str, Callable]] = {}
        self.cached: dict[nn.Module, dict[str, Edit]] = {}
        self.hook(body.decoder.register_forward_pre_hook(self._enter, with_kwargs=True))

    def hook(self, handle: Any) -> None:
        self.undo.callback(handle.remove)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Notes, before each forward pass, which positions are real and whether the prompt is being read."""
        self.hits.forwards += 1
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        mask, length = kwargs.get("attention_mask"), tokens.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -length:].bool()
        else:
            real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        cache = kwargs.get("past_key_values")
        self.step = Step(real, prefill=length > 1 or cache is None or not cache.is_initialized)

    def counted(self, layer: int, site: str, edit: Callable) -> Callable:
        """edit(x, ...) that counts its calls under (layer, site)."""
        self.hits.counts[layer, site] += 0

        def call(*args: Any) -> Tensor:
            self.hits.counts[layer, site] += 1
            return edit(*args)

        return call

    def now(self, x: Tensor) -> Step:
        """The step of this forward pass; outside one (a block run by itself) every position is real."""
        step = self.step or Step(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), prefill=True)
        return step if step.real.device == x.device else Step(step.real.to(x.device), step.prefill)

    def on_output(self, module: nn.Module, edit: Edit) -> None:
        def apply(module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0], self.now(output[0])), *output[1:])
            return edit(output, self.now(output))

        self.hook(module.register_forward_hook(apply))

    def replace(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """The module computes `function`. Padding keeps the module's own output: what overflowed there would reach
        the real tokens, because attention multiplies its values by 0 and 0 x NaN is NaN."""

        def apply(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            replaced, step = function(args[0]), self.now(args[0])
            real = step.real
            if not step.prefill or real.all():  # while prompts are read: `all` waits for a GPU, a captured step cannot
                return replaced
            real = real.view(*real.shape, *[1] * (output.ndim - 2))
            heads_first = output.ndim == 4 and (output.shape[1] == 1 or args[0].stride(1) < args[0].stride(2))
            # Gemma-3 norms q and k as [batch, heads, seq, head], others as [batch, seq, heads, head]: strides tell
            return torch.where(real.transpose(1, 2) if heads_first else real, replaced, output)

        self.hook(module.register_forward_hook(apply))

    def on_input(self, module: nn.Module, edit: Edit) -> None:
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (edit(args[0], self.now(args[0])), *args[1:]), kwargs
            states = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": edit(states, self.now(states))}

        self.hook(module.register_forward_pre_hook(enter, with_kwargs=True))

    def engage(self) -> None:
        """Places what needs all edits of a module at once: fused layers, caches, attention functions, experts."""
        for linear, parts in self.fused.items():
            _attach(self, linear, parts)
            self.hook(linear.register_forward_hook(self._run_fused))
        for attention, edits in self.cached.items():
            self.hook(attention.register_forward_pre_hook(partial(self._enter_attention, edits), with_kwargs=True))
        _engage_function(self, self.attention, "attn")
        _engage_function(self, self.experts, "experts")

    def _enter_attention(self, edits: dict[str, Edit], module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, _EditingCache):  # of a patch around this one
            cache, edits = cache.cache, _stacked(cache.edits, edits)
        return args, {**kwargs, "past_key_values": _EditingCache(cache, edits, self)}

    def _run_fused(self, linear: nn.Linear, args: tuple, output: Tensor) -> Tensor:
        """Recomputes logical parts of a fused layer from their own edited inputs, then edits their outputs."""
        parts, patch = edits_of(linear)
        if patch is not self:  # a patch within this one does what both ask for
            return output
        output, step = output.clone(), self.now(args[0])
        for (end, start, stop), edit in sorted(parts.items(), key=lambda item: item[0]):  # "input" before "output"
            rows = slice(start, stop)
            part = linear.forward(edit(args[0], step))[..., rows] if end == "input" else edit(output[..., rows], step)
            output[..., rows] = part
        return output


class _EditingCache:
    """A key-value cache (or none) that edits rotated keys and values once, as they enter it."""

    def __init__(self, cache: Any, edits: dict[str, Edit], patch: _Patch) -> None:
        self.cache, self.edits, self.patch = cache, edits, patch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step = self.patch.now(key[:, 0])
        key = self.edits["k_rotary"](key, step) if "k_rotary" in self.edits else key
        value = self.edits["v_heads"](value, step) if "v_heads" in self.edits else value
        return (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)


def _place_site(patch: _Patch, blocks: list[Block], site: str, make: Callable[..., Edit]) -> None:
    """Places make(site, layer) at every match of `site`; ValueError if there is none."""
    if site == "norm_final":
        if blocks[-1] is patch.body.blocks[-1]:
            patch.on_output(patch.body.final_norm, patch.counted(FINAL, site, make(site=site, layer=FINAL)))
        return
    matches = [(block, name) for block in blocks for name in expand_sites(block, site)]
    if not matches:
        raise ValueError(f"site {site!r} matches nothing in {type(patch.model).__name__}")
    for block, name in matches:
        _place(patch, block, name, patch.counted(block.index, name, make(site=name, layer=block.index)))


def _place(patch: _Patch, block: Block, site: str, edit: Edit) -> None:
    tensor, _, reader = site.partition(".")
    if site in NORM_SITES:
        patch.on_output(block.norms[site], edit)
    elif site in ("k_rotary", "v_heads"):
        patch.cached.setdefault(block.attention, {})[site] = edit
    elif site in ATTENTION_SITES:
        patch.attention.setdefault(block.attention, {})[site] = edit
    elif site == "block_out":
        patch.on_output(block.module, edit)
    elif site == "router":
        patch.on_input(block.router, edit)
    elif block.experts is not None and tensor in ("mlp_in", "gate", "act", "mlp_mid"):
        patch.experts.setdefault(block.experts, {})[site] = edit
    elif site in READERS:
        patch.on_input(block.attention if site == "attn_in" else block.mlp, edit)
    elif site == "act":
        patch.on_output(block.activation, edit)
    elif site in ("q", "k", "v", "gate"):
        _place_projection(patch, block, site, "output", edit)
    else:
        reads = reader or {"attn_out": "o", "mlp_mid": "down"}[site]
        _place_projection(patch, block, reads, "input", edit)


def _place_projection(patch: _Patch, block: Block, name: str, end: str, edit: Edit) -> None:
    projection = block.projections[name]
    if projection.fused:
        patch.fused.setdefault(projection.module, {})[end, projection.start, projection.stop] = edit
    elif end == "input":
        patch.on_input(projection.module, edit)
    else:
        patch.on_output(projection.module, edit)


def _place_operation(
    patch: _Patch, blocks: list[Block], operation: str, technique: Technique, state: State | None
) -> None:
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} is not one of {', '.join(OPERATIONS)}")
    for block in blocks:
        if operation == "norm":
            for site in expand_sites(block, "norm"):
                function = technique.operation(operation, block.index, state, site)
                _replace_norm(patch, block.norms[site], patch.counted(block.index, site, function))
            continue
        function = technique.operation(operation, block.index, state)
        if operation == "softmax":
            counted = patch.counted(block.index, "attn_probs", function)
            patch.attention.setdefault(block.attention, {})["softmax"] = counted
        else:
            counted = patch.counted(block.index, "act", partial(function, kind=patch.body.activation))
            if block.experts is not None:
                patch.experts.setdefault(block.experts, {})["activation"] = counted
            else:
                patch.replace(block.activation, counted)
    if operation == "norm" and blocks[-1] is patch.body.blocks[-1]:
        function = technique.operation(operation, FINAL, state, "norm_final")
        _replace_norm(patch, patch.body.final_norm, patch.counted(FINAL, "norm_final", function))


def _replace_norm(patch: _Patch, norm: nn.Module, normalise: Callable[[Tensor, float], Tensor]) -> None:
    """Normalisation by the technique; the learned scale as the model has it: before the cast in Gemma and OLMo-2."""
    weight, offset, eps = norm_parts(norm)
    before_cast = type(norm).__name__ in SCALED_BEFORE_CAST

    def replacement(x: Tensor) -> Tensor:
        normal = normalise(x.float(), eps)
        if before_cast:
            return (normal * (offset + weight.float())).to(x.dtype)
        return weight * normal.to(x.dtype)

    patch.replace(norm, replacement)


def _engage_function(patch: _Patch, edits: dict[nn.Module, dict[str, Callable]], kind: str) -> None:
    """Switches the model to our attention or experts function, with each module's edits kept on the module."""
    if not edits:
        return
    model = patch.model
    before, switch = getattr(model.config, f"_{kind}_implementation"), getattr(model, f"set_{kind}_implementation")
    for module, functions in edits.items():
        _attach(patch, module, functions)
    patch.undo.callback(switch, before)
    switch(NAME)


def _attach(patch: _Patch, module: nn.Module, edits: dict) -> None:
    """Keeps the patch's edits on the module, behind those of a patch around this one."""
    patch.undo.callback(_restore, module, getattr(module, ATTRIBUTE, None))
    setattr(module, ATTRIBUTE, (_stacked(edits_of(module)[0], edits), patch))


def _restore(module: nn.Module, before: Any) -> None:
    """Gives a module back the edits it had, those of a patch around this one."""
    delattr(module, ATTRIBUTE)
    if before is not None:
        setattr(module, ATTRIBUTE, before)


def _stacked(outer: dict, inner: dict) -> dict:
    """The edits of two patches, one engaged within the other: at a common site the inner edits what the outer gives."""

    def one_after_the_other(first: Callable, then: Callable) -> Callable:
        return lambda x, step: then(first(x, step), step)

    common = (outer.keys() & inner.keys()) - set(OPERATIONS)
    return {**outer, **inner, **{site: one_after_the_other(outer[site], inner[site]) for site in common}}
