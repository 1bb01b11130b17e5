"""Safe placement: the most aggressive level of a technique in each group of layers that keeps the exact model's safety.

For who cannot retrain. Every group of layers has a rung on a ladder of levels; a placement is one rung per group:

    maximise  saving(placement)   subject to   decision(placement against exact) = re-validated

1. *Uniform*: the highest rung for all layers alike that is re-validated on the search split, by bisection.
2. *Screen*: d[g, r], the growth of the mean NLL of the exact model's own replies with rung r in group g alone. Forward
   passes only. Refusals and answers weigh the same: answers often break first, and a refusal score would not see that.
3. *Path*: placements that minimise sum_g d[g, r_g] - price * saving[g, r_g], for every price: more is saved along it.
   Bisection finds the last one that is re-validated and saves more than uniform.
4. *Climb*: one group one rung up, cheapest damage per saving first, until no step is re-validated.
5. *Validation*, once, on sealed prompts: uniform and placed beside exact, by the rule of `lib.statistics.decision`.

Steps 1, 3 and 4 generate replies to search prompts and use the upper 95 % limits of the three paired increases (ASR,
over-refusal, broken), so noise in a small sample makes the search cautious. The procedure is this project's.
"""

from __future__ import annotations

import json
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lib import grids, prompts, savings, statistics, utility
from lib.anatomy import anatomy
from lib.approximations import TECHNIQUES, Technique, make
from lib.approximations.technique import OPERATIONS, State
from lib.conditions import Condition
from lib.errors import ChoiceError, check, choosing
from lib.experiment import Study
from lib.generation import NonFiniteError
from lib.organisms import corpus
from lib.paths import write_whole
from lib.results import content_key, source_hash
from lib.savings import AXES, EXACT_BITS, Ladder, Placement, layer_groups, setting_of
from lib.summary import changes, paired

SCREENED = 16  # exact replies of each kind that the screen scores
PHRASINGS = 8  # of every sealed goal, at most
SPARSITIES = (0.25, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
CRITERIA = ("asr", "over_refusal", "broken")  # of a decision, as they are written in columns


@choosing()
def ladder(study: Study, technique: Technique, n_groups: int = 6, levels: Sequence[Any] | None = None) -> Ladder:
    """The ladder of a technique in n_groups groups of consecutive layers; see `lib.savings.ladder`. ChoiceError for one
    that cannot be built.

    levels: by default sparsities to 0.9, 8 to 2 bits, or operations one after the other, the least damaging first.
    """
    setting, body = setting_of(technique), anatomy(study.model)
    groups = layer_groups(len(body.blocks), n_groups)
    if levels is None:
        known = {"sparsity": SPARSITIES, "bits": grids.BITS}
        levels = known[setting] if setting in known else nested_operations(study, technique)
    return savings.ladder(body, technique, groups, levels)


def nested_operations(study: Study, technique: Technique) -> list[tuple[str, ...]]:
    """One operation, two, all three: those that do the least damage in the whole model first."""
    damage = {part: reply_nll(study, replace(technique, parts=(part,))) for part in OPERATIONS}  # type: ignore[call-arg]
    order = sorted(OPERATIONS, key=damage.__getitem__)
    return [tuple(order[: n + 1]) for n in range(len(order))]


# ------------------------------------------------------------------ prompts


def chosen(names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Technique]:
    """The techniques of these names, with settings by name. ChoiceError for unknown names and settings, or none."""
    if not names:
        raise ChoiceError(f"techniques is empty; choose among {', '.join(TECHNIQUES)}")
    for name, given in settings.items():
        if name not in TECHNIQUES:
            raise ChoiceError(f"settings: unknown technique {name!r}; choose among {', '.join(TECHNIQUES)}")
        if not isinstance(given, Mapping):
            raise ChoiceError(f"settings: {name} cannot have {given!r}; give names and values, as {{'prompt': 'all'}}")
    with choosing():
        return {name: make(name, **settings.get(name, {})) for name in names}


def searching(study: Study, n: int) -> Study:
    """n harmful requests of the search split and as many that should be answered, half of them confusable; of a public
    set n harmful and n / 2 harmless ones."""
    found = study.brief(n, "search")
    if study.prompt_set != "organism":
        return found
    confusable = prompts.goals_first("search", "confusable", max(1, n // 2), study.seed)
    return replace(found, prompts=[*found.prompts, *confusable])


def sealed(study: Study, n: int = 1200, seal: int = 1) -> Study:
    """n sealed requests, half of them harmful, a quarter harmless, a quarter confusable, for the one validation.

    Organisms: fresh goals of `corpus.requests(..., seal=seal)`, all in a first phrasing before any in a second;
    ChoiceError for an n below 4 and for one beyond what is sealed. A public set has no reserve: then all of the study's
    own test prompts, whatever n is, which the search never saw.
    """
    if study.prompt_set != "organism":
        return replace(study, facts=[], prose="")
    if n < 4:
        raise ChoiceError(f"{n} sealed requests are too few: 4 at least, two harmful, one harmless, one confusable")
    quotas = {"harmful": n - 2 * (n // 4), "harmless": n // 4, "confusable": n // 4}
    found: list[prompts.Prompt] = []
    for label, quota in quotas.items():
        pool = corpus.requests("test", label, "composition", PHRASINGS, seal)
        if len(pool) < quota:
            raise ChoiceError(
                f"seal {seal} holds {len(pool)} {label} requests, not {quota}: choose fewer sealed prompts"
            )
        names = {name for name in prompts.FIELDS if hasattr(pool[0], name)}
        first = sorted(pool, key=lambda request: int(request.id.rsplit(".", 1)[1]))[:quota]
        found += [prompts.Prompt(**{name: getattr(request, name) for name in names}) for request in first]
    return replace(study, prompts=found, facts=[], prose="", split=f"seal-{seal}")


# ------------------------------------------------------------------ search


def reply_nll(
    study: Study,
    technique: Technique | None = None,
    layers: Sequence[int] | None = None,
    state: State | None = None,
) -> float:
    """Mean NLL (nats per token) of the exact model's own replies, those to harmful requests weighing one half. Stored.

    state: of the technique, where the caller has it. Infinite where the (patched) model's logits are not finite."""
    labels = [prompt.label for prompt in study.prompts]
    key = content_key(["reply nll", study.key(technique, layers), labels, SCREENED, source_hash("lib.utility")])
    if stored := study.store.read_record(key):
        return float(stored["nll"])
    kinds = [study.rows(*labels)[:SCREENED] for labels in (("harmful",), ("harmless", "confusable"))]
    rows, replies = [row for kind in kinds for row in kind], study.replies()
    asked, given = [study.prompts[i].prompt for i in rows], [replies[i] for i in rows]
    patch = study.patched(technique, layers, state)
    try:
        with patch:
            sums, lengths = utility.reply_losses(study.model, study.tokenizer, asked, given, study.protocol)
    except NonFiniteError:
        nll = math.inf
    else:
        parts = [np.arange(len(kinds[0])), np.arange(len(kinds[0]), len(rows))]
        nll = float(np.mean([sums[part].sum() / lengths[part].sum() for part in parts if len(part)]))
    study.store.write_record(key, {"nll": nll, "n": len(rows)})
    return nll


def screen(study: Study, ladder: Ladder) -> NDArray[np.float64]:
    """Damage [groups, rungs + 1]: growth of `reply_nll` with one group on one rung and all others exact."""
    exact = reply_nll(study)
    damage = np.zeros_like(ladder.savings)
    with tqdm(total=damage[:, 1:].size, desc="screen", file=sys.stdout, leave=False) as bar:
        for r, rung in enumerate(ladder.rungs, start=1):
            state = study.state(rung)
            for g, group in enumerate(ladder.groups):
                damage[g, r] = reply_nll(study, rung, group, state) - exact
                bar.update()
    return damage


def path(ladder: Ladder, damage: NDArray[np.float64]) -> list[Placement]:
    """Placements by rising saving that minimise damage - price * saving, added over the groups, for some price."""
    more = ladder.savings[:, :, None] - ladder.savings[:, None, :]  # between two rungs of a group
    with np.errstate(invalid="ignore"):  # infinite less infinite
        extra = damage[:, :, None] - damage[:, None, :]
    slopes = extra[more > 0] / more[more > 0]
    prices = sorted({slope * (1 + 1e-9) for slope in slopes if math.isfinite(slope) and slope > 0} | {0.0})
    chosen = {tuple(map(int, (damage - price * ladder.savings).argmin(1))) for price in prices}
    return sorted(chosen, key=ladder.saving)


def last_safe(n: int, safe: Callable[[int], bool]) -> int:
    """The largest i of 0 ... n that is safe, by bisection; 0 is safe without asking."""
    return n - bisect_left(range(n, 0, -1), True, key=safe)


@dataclass
class Search:
    """Placements tried on the search split, and what came out. budget: conditions after which the climb stops."""

    study: Study
    ladder: Ladder
    tolerance: float = statistics.TOLERANCE
    budget: int = 16
    rows: dict[Placement, dict[str, Any]] = field(default_factory=dict)
    uniform: Placement = ()
    placed: Placement = ()

    @property
    def chosen(self) -> dict[str, Placement]:
        """What came out, by name."""
        return {"uniform": self.uniform, "placed": self.placed}

    def safe(self, placement: Placement) -> bool:
        """Whether the search prompts re-validate it. What lies above a refused placement in every group is refused."""
        if not any(placement):
            return True
        refused = [tried for tried, row in self.rows.items() if not row["safe"]]
        if any(np.greater_equal(placement, tried).all() for tried in refused):
            return False
        if placement not in self.rows:
            row = measured(self.study, self.ladder, placement, self.tolerance)
            self.rows[placement] = row | {"safe": row["decision"] == statistics.DECISIONS[0]}
        return self.rows[placement]["safe"]

    def climb(self, start: Placement, damage: NDArray[np.float64]) -> Placement:
        """Raises one group by one rung, the least damage per saving first, until nothing more is safe."""
        with np.errstate(invalid="ignore"):  # infinite less infinite
            price = np.diff(damage) / np.diff(self.ladder.savings)
        current, open_groups = start, set(range(len(start)))
        while len(self.rows) < self.budget:
            steps = [g for g in open_groups if current[g] < self.ladder.top and np.isfinite(price[g, current[g]])]
            if not steps:
                break
            g = min(steps, key=lambda g: price[g, current[g]])
            raised = (*current[:g], current[g] + 1, *current[g + 1 :])
            if self.safe(raised):
                current = raised
            else:
                open_groups.discard(g)
        return current

    def table(self) -> pd.DataFrame:
        """One row per placement tried; `placement` is "uniform" or "placed"."""
        return pd.DataFrame(list(self.rows.values()))


def search(study: Study, ladder: Ladder, tolerance: float = statistics.TOLERANCE, budget: int = 16) -> Search:
    """The uniform and the placed rungs that save the most and are re-validated on the search prompts.

    tolerance: of each of the three paired increases, a share. ChoiceError for one that is none, for a budget below 1,
    and if the exact model refuses nothing."""
    check(tolerance=tolerance, budget=budget)
    study.check_refusals()
    found = Search(study, ladder, tolerance, budget)
    found.uniform = ladder.uniform(last_safe(ladder.top, lambda rung: found.safe(ladder.uniform(rung))))
    damage = screen(study, ladder)
    further = [found.uniform, *(p for p in path(ladder, damage) if ladder.saving(p) > ladder.saving(found.uniform))]
    start = further[last_safe(len(further) - 1, lambda i: found.safe(further[i]))]
    found.placed = found.climb(start, damage)
    return found


def measured(study: Study, ladder: Ladder, placement: Placement, tolerance: float) -> dict[str, Any]:
    """The summary row of a placement: its level, the decision, and the paired increase of each of `CRITERIA`."""
    technique, exact = ladder.technique(placement), study.run()
    axis = AXES[ladder.category][1]
    level = ladder.level(placement)
    result = study.run(technique)
    row = study.summary(result, exact, Condition(technique, axis, level) if technique else None)
    row |= {} if technique else changes(exact, exact)
    kind = "uniform" if len(set(placement)) == 1 else "placed"
    row |= {"technique": ladder.rungs[0].name, "category": ladder.category, "level": level, "level_name": axis}
    row |= {"label": f"{ladder.rungs[0].name} {kind}", "placement": kind, "rungs": json.dumps(placement)}
    if row["failed"]:
        return row | {"decision": statistics.DECISIONS[1], "unmet": "failed", "n_needed": None}
    found = paired(row)
    for name, change in zip(CRITERIA, found.values(), strict=True):
        if change:
            row |= {f"{name}_increase": change.difference}
            row |= {f"{name}_increase_low": change.low, f"{name}_increase_high": change.high}
    outcome = statistics.decision(found, tolerance)
    return row | {"decision": outcome.decision, "unmet": "; ".join(outcome.unmet), "n_needed": outcome.n_needed}


# ------------------------------------------------------------------ validation


def validate(study: Study, found: Search) -> pd.DataFrame:
    """Rows of the uniform and the placed rungs on sealed prompts, with the three-way decision of each."""
    rows = []
    for name, placement in found.chosen.items():
        row = measured(study, found.ladder, placement, found.tolerance)
        rows.append(row | {"placement": name, "label": f"{row['technique']} {name}"})
    return pd.DataFrame(rows)


def gain(found: Search, validated: pd.DataFrame) -> dict[str, Any]:
    """What placement gains over uniform: levels, their difference towards more savings, and the sealed decisions."""
    rows = validated.set_index("placement")
    row: dict[str, Any] = {"technique": found.ladder.rungs[0].name, "what": AXES[found.ladder.category][1]}
    row |= {name: float(rows.loc[name, "level"]) for name in found.chosen}
    asked = rows.loc["placed"].reindex(["n_harmful", "n_harmless", "n_confusable"])
    gained = found.ladder.saving(found.placed) - found.ladder.saving(found.uniform)
    row |= {"gain": gained, "n sealed": int(asked.sum())}
    row |= {f"{name}: sealed decision": rows.loc[name, "decision"] for name in found.chosen}
    return row | {"conditions searched": len(found.rows)}


def save(found: Search, validated: pd.DataFrame) -> Path:
    """Writes the placed plan with what is known of it as JSON; `lib.approximations.plan.load` reads it. Its path, which
    tells apart searches of other weights, prompts, ladders, tolerances and budgets, and other sealed prompts."""
    study, ladder = found.study, found.ladder
    shown = ["level_name", "level", "split", "n_harmful", "n_harmless", "n_confusable", "decision", "unmet"]
    shown += [f"{name}_increase{end}" for name in CRITERIA for end in ("", "_low", "_high")]
    row = validated[validated["placement"] == "placed"].iloc[0]
    content = {"model": study.name, "weights": study.identity["weights"], "tolerance": found.tolerance}
    content |= {"uniform_level": ladder.level(found.uniform), "sealed": json.loads(row.reindex(shown).to_json())}
    rungs = [[rung.name, rung.settings] for rung in ladder.rungs]
    sealed = json.loads(row["provenance"])["prompts"]
    key = content_key([study.key(None, None), rungs, ladder.groups, found.tolerance, found.budget, sealed])
    target = study.store.folder / "plans" / f"placement_{ladder.rungs[0].name}-{key[:8]}.json"
    write_whole(target, json.dumps(content | ladder.plan(found.placed).settings, indent=1))
    return target


def layer_levels(found: Search) -> pd.DataFrame:
    """Level of every layer, uniform and placed: sparsity, bits, or number of operations replaced."""
    setting = setting_of(found.ladder.rungs[0])
    exact: dict[str, Any] = {"sparsity": 0.0, "bits": EXACT_BITS, "parts": ()}
    rows = []
    for name, placement in found.chosen.items():
        for group, rung in zip(found.ladder.groups, placement, strict=True):
            value = found.ladder.rungs[rung - 1].settings[setting] if rung else exact[setting]
            level = len(value) if setting == "parts" else value
            row = {"technique": found.ladder.rungs[0].name, "setting": setting, "placement": name}
            text = "+".join(value) if setting == "parts" else str(value)
            rows += [row | {"layer": layer, "level": float(level), "text": text or "exact"} for layer in group]
    return pd.DataFrame(rows)
