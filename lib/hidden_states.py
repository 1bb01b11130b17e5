"""Hidden states of harmful and harmless prompts, exact and approximated: where they lie, how far they move and where.

    direction u = (mean of harmful - mean of harmless states) / gap,  gap = its length           (refusal direction)
    place of a state h on it: (h - midpoint) . u / gap              (harmful mean at +1/2, harmless mean at -1/2)

The direction is fitted on prompts that are not reported (difference of means: Arditi et al., arXiv:2406.11717). PCA is
fitted on exact states and approximated ones are projected into its axes: axes fitted on both would turn with the shift
and hide it. Classical MDS of all states together is what the studied paper shows (arXiv:2502.00840, third observation).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import ClassicalMDS
from sklearn.metrics import silhouette_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lib import fidelity, prompts, statistics
from lib.anatomy import EXPERT_SITES
from lib.approximations import Step, Technique
from lib.batches import map_batches
from lib.conditions import Layers, describe
from lib.errors import ChoiceError, choosing
from lib.experiment import Study
from lib.generation import NonFiniteError
from lib.organisms import corpus
from lib.patching import observed

log = logging.getLogger(__name__)

Array = NDArray[Any]
BATCH_TOKENS = 8192  # per forward pass; with one site's tensor at a time this bounds what is held besides the result
FOLDS, CONTROLS, NEIGHBOURS = 5, 200, 3


@choosing()
def capture(
    study: Study,
    asked: Sequence[prompts.Prompt],
    technique: Technique | None = None,
    layers: Layers = None,
    site: str = "block_out",
    position: int = -1,
) -> dict[int, Array]:
    """Layer -> states [prompts, hidden] float32 at a site and token position, counted from the end of the prompt.

    layers: which layers are approximated; states come from all. One batch at a time is on the device and only the
    wanted position is kept, so memory is layers x prompts x hidden x 4 bytes. ChoiceError if a prompt is too short for
    the position, for a site that is not there or not one vector per token, and for layers the model does not have."""
    if site in EXPERT_SITES and fidelity.is_mixture(study):
        raise ValueError(f"{site} of a mixture has no single state per token; choose block_out, attn_in or attn_out")
    encoded = prompts.encode(study.tokenizer, asked, study.protocol)
    if not 1 <= -position <= min(map(len, encoded)):
        raise ValueError(f"position {position} is not valid; the shortest prompt has {min(map(len, encoded))} tokens")
    states: dict[int, Array] = {}
    rows: list[int] = []

    def read(layer: int, _: str, x: Tensor, step: Step) -> None:
        if x.ndim != 3:
            raise ValueError(f"{site} is not [batch, seq, channels]; choose a site such as block_out or mlp_mid")
        states.setdefault(layer, np.empty((len(encoded), x.shape[-1]), np.float32))
        states[layer][rows] = x[:, position].float().cpu().numpy()

    def forward(batch: dict[str, Tensor], chosen: list[int]) -> None:
        rows[:] = chosen
        study.model(**batch, use_cache=False, logits_to_keep=1)

    patch, size = study.patched(technique, layers), max(1, BATCH_TOKENS // max(map(len, encoded)))
    with torch.inference_mode(), patch, observed(study.model, (site,), read):
        map_batches(study.model, encoded, size, forward, study.tokenizer.pad_token_id)
    return states


def capture_all(
    study: Study,
    asked: Sequence[prompts.Prompt],
    techniques: Sequence[Technique],
    layers: Layers = None,
    site: str = "block_out",
    position: int = -1,
) -> dict[Technique, dict[int, Array]]:
    """Technique -> `capture` under it. Left out with a warning: those whose calibration fails, or whose states are not
    finite."""
    found = {}
    for technique in techniques:
        try:
            states = capture(study, asked, technique, layers, site, position)
            if not all(np.isfinite(x).all() for x in states.values()):
                raise NonFiniteError("its states are NaN or infinite")
        except NonFiniteError as error:
            log.warning("%s left out: %s", describe(technique), error)
        else:
            found[technique] = states
    return found


def fitting_prompts(study: Study, n: int = 120) -> tuple[list[prompts.Prompt], list[prompts.Prompt]]:
    """(prompts to fit the direction on, prompts to report), no prompt in both: an organism's training requests and the
    study's prompts; for other sets every second of the study's prompts each."""
    if study.prompt_set != "organism":
        return study.prompts[1::2], study.prompts[::2]
    pools = [corpus.requests("train", label=label, tier="composition") for label in ("harmful", "harmless")]
    found = [request for pool in pools for request in pool[:: max(1, len(pool) // n)][:n]]
    return [prompts.Prompt(id=r.id, prompt=r.prompt, label=r.label) for r in found], study.prompts


@dataclass(frozen=True)
class Direction:
    """Refusal direction of one layer: unit vector u [hidden], midpoint of the two means [hidden], their distance."""

    u: Array
    midpoint: Array
    gap: float

    def place(self, states: Array) -> Array:
        """Places [n] along the direction: +1/2 at the harmful mean, -1/2 at the harmless mean."""
        return (states - self.midpoint) @ self.u / self.gap


def refusal_direction(states: Array, labels: ArrayLike) -> Direction:
    """Difference of means of harmful and harmless states [n, hidden]. NaN where they differ by rounding alone, as at
    `attn_in` in layer 0, where a state knows its own token only."""
    kinds = np.asarray(labels)
    harmful, harmless = (states[kinds == name].mean(0, dtype=np.float64) for name in ("harmful", "harmless"))
    gap = float(np.linalg.norm(harmful - harmless))
    gap = gap if gap > 1e-6 * np.linalg.norm(harmful) else math.nan
    return Direction((harmful - harmless) / gap, (harmful + harmless) / 2, gap)


def principal_axes(exact: Array) -> PCA:
    """The first two axes of exact states [prompts, hidden]; project exact and approximated ones by `.transform`."""
    return PCA(2, svd_solver="full").fit(exact)


def classical_mds(states: Array) -> Array:
    """Coordinates [prompts, 2] whose distances fit those of the states: B = -1/2 J D^2 J, its leading eigenvectors.

    With Euclidean distances this is PCA of the same points up to sign (Torgerson 1952)."""
    return ClassicalMDS(2).fit_transform(states.astype(np.float64))


def fisher_separation(places: Array, labels: ArrayLike) -> float:
    """(difference of means)^2 / (sum of variances) of harmful and harmless places [n] on one axis."""
    harmful, harmless = (places[np.asarray(labels) == name] for name in ("harmful", "harmless"))
    return float((harmful.mean() - harmless.mean()) ** 2 / (harmful.var(ddof=1) + harmless.var(ddof=1)))


def best_layer(states: dict[int, Array], directions: dict[int, Direction], labels: ArrayLike) -> int:
    """The layer whose direction separates harmful and harmless states [n, hidden] best (`fisher_separation`)."""
    found = {layer: fisher_separation(one.place(states[layer]), labels) for layer, one in directions.items()}
    return max(found, key=lambda layer: -math.inf if math.isnan(found[layer]) else found[layer])


def probe_accuracy(exact: Array, tests: dict[str, Array], labels: Array, groups: Sequence[Any]) -> dict[str, float]:
    """Balanced accuracy of a linear probe (harmful or not) fitted on exact states and cross-validated over groups.

    tests: name -> states [n, hidden] of the same prompts; each fold's probe meets only prompts that it was not fitted
    on. Labels: bool [n]."""
    right = {name: np.zeros(len(labels), dtype=bool) for name in tests}
    for train, test in GroupKFold(FOLDS).split(exact, labels, groups):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500, class_weight="balanced"))
        probe.fit(exact[train], labels[train])
        for name, states in tests.items():
            right[name][test] = probe.predict(states[test]) == labels[test]
    return {name: float((hits[labels].mean() + hits[~labels].mean()) / 2) for name, hits in right.items()}


def random_shift(exact: Array, approximate: Array) -> Array:
    """Exact states moved as far as each one's approximation moved it, in a random direction."""
    steps = np.random.default_rng(0).standard_normal(exact.shape)
    lengths = np.linalg.norm(approximate - exact, axis=1, keepdims=True)
    return exact + steps / np.linalg.norm(steps, axis=1, keepdims=True) * lengths


def drift(exact: Array, approximate: Array, labels: ArrayLike, direction: Direction) -> dict[str, float]:
    """How far and where to approximation moves the states [n, hidden] of one layer.

    towards harmless: by how much of the gap harmful prompts move down the direction; towards harmful: harmless ones up
        it; both with 95 % bootstrap intervals. A symmetric blur moves both alike.
    share along: of the squared mean shift of harmful prompts. random share, shuffled share: its 97.5 % quantile over
        random directions, and over differences of means after shuffling the labels.
    cosine drift: of harmful prompts, mean of 1 - cos(exact state, approximated state), both from the midpoint.
    """
    kinds, moved = np.asarray(labels), direction.place(approximate) - direction.place(exact)
    row: dict[str, float] = {}
    parts = {"towards harmless": -moved[kinds == "harmful"], "towards harmful": moved[kinds == "harmless"]}
    for name, values in parts.items():
        low, high = statistics.bootstrap(values, draws=2000)
        row |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    shift = (approximate - exact)[kinds == "harmful"].mean(0, dtype=np.float64)
    unit = shift / max(float(np.linalg.norm(shift)), 1e-12)
    row["share along"] = float((unit @ direction.u) ** 2)
    rng = np.random.default_rng(0)
    orders = rng.permuted(np.tile(kinds == "harmful", (CONTROLS, 1)), axis=1)
    weights = orders / orders.sum(1, keepdims=True) - ~orders / (~orders).sum(1, keepdims=True)
    controls = {"random": rng.standard_normal((CONTROLS, len(unit))), "shuffled": weights @ exact}
    for name, vectors in controls.items():
        along = (vectors @ unit) / np.linalg.norm(vectors, axis=1)
        row[f"{name} share"] = float(np.quantile(along**2, 0.975))
    row["shift / gap"] = float(np.linalg.norm(shift)) / direction.gap
    a, b = exact - direction.midpoint, approximate - direction.midpoint
    cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return row | {"cosine drift": float(1 - cosines[kinds == "harmful"].mean())}


def layer_table(
    exact: dict[int, Array],
    approximate: dict[int, Array],
    asked: Sequence[prompts.Prompt],
    directions: dict[int, Direction],
) -> pd.DataFrame:
    """One row per layer: `drift`, separation of exact and approximated states, probes and their controls.

    ChoiceError for too few prompts."""
    kinds = np.array([prompt.label for prompt in asked])
    two = np.isin(kinds, ("harmful", "harmless"))
    labels, groups = kinds[two], [prompt.goal or prompt.id for prompt in np.array(asked, dtype=object)[two]]
    if len(set(groups)) < FOLDS or min((labels == name).sum() for name in ("harmful", "harmless")) < 2:
        raise ChoiceError(f"{len(labels)} harmful and harmless prompts are too few for a probe: raise n_prompts")
    rows = []
    for layer, states in exact.items():
        before, after = states[two], approximate[layer][two]
        row: dict[str, Any] = {"layer": layer, **drift(before, after, labels, directions[layer])}
        for name, points in (("exact", before), ("approximated", after)):
            row[f"silhouette, {name}"] = float(silhouette_score(points, labels))
            row[f"Fisher, {name}"] = fisher_separation(directions[layer].place(points), labels)
        tests = {"exact": before, "approximated": after, "random shift": random_shift(before, after)}
        for name, rate in probe_accuracy(before, tests, labels == "harmful", groups).items():
            row[f"probe, {name}"] = rate
        shuffled = np.random.default_rng(0).permutation(labels)
        row["probe, shuffled labels"] = probe_accuracy(before, {"": before}, shuffled == "harmful", groups)[""]
        rows.append(row)
    return pd.DataFrame(rows)


def flips(margins: Array, moved: Array, flipped: Array) -> dict[str, Any]:
    """Did prompts whose verdict flipped move further than others of equal clean margin?

    margins, moved [n]: place of the exact state on the refusal direction, and how far it moved towards harmless;
    flipped bool [n]. Each flipped prompt is compared with the mean of the 3 others nearest in margin, and left out if
    one of them is further than a quarter of the margins' standard deviation. Bootstrap interval over flipped prompts;
    "difference" is without matching. Fewer than 5 flipped or matched prompts, or 3 others, give no difference."""
    row: dict[str, Any] = {"flipped": int(flipped.sum()), "others": int((~flipped).sum()), "matched": 0}
    if flipped.sum() < 5 or (~flipped).sum() < NEIGHBOURS:
        return row
    row["difference"] = float(moved[flipped].mean() - moved[~flipped].mean())
    distance = np.abs(margins[flipped][:, None] - margins[~flipped][None, :])
    nearest = np.argsort(distance, axis=1)[:, :NEIGHBOURS]
    close = np.take_along_axis(distance, nearest, 1).max(1) <= margins.std() / 4
    differences = (moved[flipped] - moved[~flipped][nearest].mean(1))[close]
    if len(differences) < 5:
        return row | {"matched": len(differences)}
    low, high = statistics.bootstrap(differences, draws=4000)
    row |= {"margin, flipped": float(margins[flipped].mean()), "margin, others": float(margins[~flipped].mean())}
    row |= {"matched": len(differences), "matched difference": float(differences.mean())}
    return row | {"low": low, "high": high}


def flip_table(
    study: Study, asked: Sequence[prompts.Prompt], moved: dict[Technique, Array], places: Array, layers: Layers = None
) -> pd.DataFrame:
    """`flips` per technique among the harmful prompts that the exact model refuses.

    moved: technique -> places [prompts] on the refusal direction under it; places: of the exact states. Techniques that
    draw noise are left out: the draws of a captured state are not those of the judged reply."""
    ids, rows = [prompt.id for prompt in asked], []
    exact = study.run().set_index("id").loc[ids]
    kept = ((exact["label"] == "harmful") & (exact["verdict"] == "refused")).to_numpy()
    for technique, after in moved.items():
        if technique.category != "noise":
            complied = (study.run(technique, layers).set_index("id").loc[ids, "verdict"] == "complied").to_numpy()
            found = flips(places[kept], (places - after)[kept], complied[kept])
            rows.append({"label": describe(technique), **found})
    return pd.DataFrame(rows)


def third_observation(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's third observation in `layer_table` rows of one layer (chosen beforehand), one row per technique.

    moves: harmful prompts move towards harmless (95 % interval above 0). not a blur: by more than harmless ones move
    towards harmful. not a translation: by more than harmless ones move the same way. held: these three. not by chance
    asks more than the paper claims: more of the shift is along the direction than along 97.5 % of those from shuffled
    labels.
    """
    found = table[["technique", "layer", "towards harmless", "towards harmless_low", "towards harmless_high"]].copy()
    found["moves"] = table["towards harmless_low"] > 0
    found["not a blur"] = table["towards harmless_low"] > table["towards harmful_high"]
    found["not a translation"] = table["towards harmless_low"] > -table["towards harmful_low"]
    found["not by chance"] = table["share along"] > table["shuffled share"]
    return found.assign(held=found[["moves", "not a blur", "not a translation"]].all(axis=1))
