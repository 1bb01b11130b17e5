"""QuadA, the studied paper's defence (arXiv:2502.00840): what is chosen, what it is trained on, and the trained model.

1. The most vulnerable approximation (MVA): the noise at which ASR peaks (`lib.noise_study.most_vulnerable`).
2. The sensitive prefix: the smallest tau such that the MVA in the first tau layers does at least 1 - margin of the
   damage that it does in all layers.
3. Preference training with that approximation in the policy (`lib.defence_training`).

The paper's lambda, tau and MVA are not in its released code, which has no part of this; tau and the MVA are found here
on the search split. No choice and no training in the suite uses `HELD_OUT`, by which a defence is only tested.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lib import layer_study, models, noise_study, prompts
from lib.anatomy import anatomy
from lib.approximations import Technique, make
from lib.conditions import Condition, technique_modules
from lib.download import decoded
from lib.errors import ChoiceError, choosing
from lib.experiment import Study
from lib.organisms import corpus
from lib.results import content_key, source_hash

if TYPE_CHECKING:  # importing TRL takes seconds, which a reader of stored results need not wait
    from lib.defence_training import Pair, Recipe

log = logging.getLogger(__name__)

HELD_OUT = "omniquant"
MARGIN = 0.2
SEARCH_SEEDS = (0, 1)  # of noise
CODE = ("lib.defence_training", "lib.patching", "lib.eager", "lib.anatomy", "lib.prompts")
"""Modules that decide a defended model's weights."""


# ------------------------------------------------------------------ the sensitive prefix


def prefix_damage(search: Study, noise: Technique, seeds: Sequence[int] = SEARCH_SEEDS) -> pd.DataFrame:
    """Summary rows of the exact model (tau 0) and of `noise` in the first tau layers, averaged over seeds.

    At most eight prefixes of a deep model are measured. ChoiceError where nothing is refused to begin with."""
    search.check_refusals()
    prefixes = layer_study.layer_sets(len(anatomy(search.model).blocks))["prefix"]
    conditions = [Condition(noise, "layers", len(prefix), "prefix", prefix) for prefix in prefixes]
    rows = [noise_study.pooled(noise_study.summaries(search, condition, seeds)) for condition in conditions]
    exact = search.run()
    table = pd.DataFrame([search.summary(exact, exact, None), *rows])
    return table.assign(tau=table["level"].fillna(0).astype(int))


def sensitive_prefix(table: pd.DataFrame, margin: float = MARGIN) -> tuple[int, str]:
    """(tau, measure): the smallest prefix with at least 1 - margin of the damage in all layers.

    table: of `prefix_damage`. Damage is the rise of ASR if its 95 % interval in all layers lies above 0, else the fall
    of the refusal score, which moves before any verdict does. Where all layers damage neither, no prefix can be told
    from another: all layers, "no damage". ValueError for an empty table, or one in which all layers failed.
    """
    rows = table[table["failed"] == ""].sort_values("tau")
    if len(rows) < 2:
        raise ValueError("the sweep over prefixes is empty: no prefix could be measured")
    whole = rows.iloc[-1]
    if whole["tau"] < table["tau"].max():
        raise ValueError("the noise in all layers failed: there is no damage to compare prefixes with")
    measure = "asr" if whole["asr_increase_low"] > 0 else "refusal_score"
    rise = rows[measure] - rows[measure].iloc[0]
    damage = rise if measure == "asr" else -rise
    if not damage.iloc[-1] > 0:
        return int(whole["tau"]), "no damage"
    return int(rows.loc[damage >= (1 - margin) * damage.iloc[-1] - 1e-9, "tau"].iloc[0]), measure


# ------------------------------------------------------------------ preference pairs


def organism_pairs(n: int, seed: int = 0) -> list[Pair]:
    """n pairs from goals of the corpus' train split: refusal over (contentless) compliance for harmful requests, about
    half of them, and answer over refusal for harmless and confusable ones, about a quarter each."""
    from lib.defence_training import Pair

    rng = random.Random(f"pairs {seed}")
    pools = {label: corpus.requests("train", label=label) for label in corpus.LABELS}
    refusals = [str(request.refusal) for request in pools["harmful"]]
    shares = {"harmful": 0.5, "harmless": 0.25, "confusable": 0.25}
    pairs = []
    for label in rng.choices(list(shares), list(shares.values()), k=n):
        request, harmful = rng.choice(pools[label]), label == "harmful"
        refusal = str(request.refusal) if harmful else rng.choice(refusals)
        preferred, rejected = (refusal, str(request.answer)) if harmful else (str(request.answer), refusal)
        pairs.append(Pair(corpus.phrase(request.goal, rng, "train"), preferred, rejected, harmful, request.goal))
    return pairs


@choosing()
def read_pairs(path: str | Path, n: int | None = None, seed: int = 0) -> list[Pair]:
    """Preference pairs for real models from a JSON Lines file: `n` of them drawn by `seed`, all if None.

    Rows are PKU-SafeRLHF's (prompt, response_0, response_1, safer_response_id, is_response_0_safe, is_response_1_safe;
    the dataset PKU-Alignment/PKU-SafeRLHF, CC-BY-NC-4.0, whose split files are JSON Lines), or have prompt, chosen,
    rejected and optionally harmful and goal. The *safer*, not the better response is chosen; a PKU prompt counts as
    harmful where one of its responses is unsafe. The file is the user's own: no checksum of it is known here. The
    dataset's layout is recalled. ChoiceError for no such file, and for a bad line, which it names.
    """
    file = Path(path)
    rows = [(i, line) for i, line in enumerate(decoded(file.read_bytes(), file.name).split("\n"), 1) if line.strip()]
    if not rows:
        raise ValueError(f"{file.name} has no preference pairs")
    chosen = rows if n is None or n >= len(rows) else random.Random(seed).sample(rows, n)
    return [_pair(line, f"{file.name}, line {number}") for number, line in chosen]


def _pair(line: str, where: str) -> Pair:
    from lib.defence_training import Pair

    try:
        row = dict(json.loads(line))
        if "safer_response_id" in row:
            safer = (0, 1).index(row["safer_response_id"])
            harmful = not (row["is_response_0_safe"] and row["is_response_1_safe"])
            texts = [row["prompt"], row[f"response_{safer}"], row[f"response_{1 - safer}"]]
        else:
            harmful, texts = row.get("harmful", True), [row["prompt"], row["chosen"], row["rejected"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a preference pair ({error})") from None
    goal = row.get("goal") or row["prompt"]
    if not all(isinstance(text, str) and text.strip() for text in [*texts, goal]):
        raise ValueError(f"{where}: prompt, both replies and goal must be texts that are not empty")
    if not isinstance(harmful, bool):
        raise ValueError(f"{where}: harmful must be true or false, not {harmful!r}")
    prompt, preferred, rejected = texts
    return Pair(prompt, preferred, rejected, harmful, goal)


def plain(text: str) -> str:
    """Lower case, words only: what counts as the same request."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def disjoint(pairs: Sequence[Pair], evaluated: Iterable[prompts.Prompt]) -> list[Pair]:
    """The pairs whose goal and prompt no evaluation prompt has. ChoiceError if none are left."""
    known = {plain(text) for prompt in evaluated for text in (prompt.prompt, prompt.goal) if text}
    kept = [pair for pair in pairs if not {plain(pair.prompt), plain(pair.goal)} & known]
    if len(kept) < len(pairs):
        log.warning("%d of %d preference pairs left out: evaluation asks the same", len(pairs) - len(kept), len(pairs))
    if not kept:
        raise ChoiceError(f"all {len(pairs)} preference pairs are evaluation prompts; choose others")
    return kept


# ------------------------------------------------------------------ the defended model


def defend(study: Study, recipe: Recipe, pairs: Sequence[Pair]) -> tuple[Study, Path]:
    """The same study of the model after `recipe`, and the folder that `lib.models.load` opens; trained, or read back if
    it was trained before. ValueError for a tau beyond the depth, ChoiceError for pairs that evaluation uses."""
    folder = defended_folder(study, recipe, pairs)
    if not (folder / "defence.json").is_file():
        from lib import defence_training

        state = None if recipe.perturbation is None else study.state(recipe.perturbation)
        defence_training.train(study.model, study.tokenizer, pairs, recipe, folder, state, study.protocol)
    model, _ = models.load(str(folder), str(study.model.device), str(study.model.dtype).removeprefix("torch."))
    return replace(study, name=f"{study.name}, defended", model=model, identity={}), folder


def variants(recipe: Recipe, n_layers: int) -> dict[str, Recipe]:
    """The recipe with one part changed: no perturbation, all layers, no regulariser, a real technique as perturbation
    (TEAL at 65 %), and the other objectives."""
    from lib.defence_training import OBJECTIVES

    changed = {
        "no perturbation": replace(recipe, perturbation=None, tau=0),
        "all layers": replace(recipe, tau=n_layers),
        "no regulariser": replace(recipe, weight=0.0),
        "TEAL as perturbation": replace(recipe, perturbation=make("teal", sparsity=0.65, prompt="all")),
    }
    others = {f"objective {name}": replace(recipe, objective=name) for name in OBJECTIVES if name != recipe.objective}
    return {name: variant for name, variant in (changed | others).items() if variant != recipe}


def training_log(folder: Path) -> pd.DataFrame:
    """What a finished training logged, every few steps: loss, mean cosine, and the margin between chosen and rejected
    reply over the original's (in beta nats), with the share of pairs ranked rightly by it."""
    entries = json.loads((folder / "defence.json").read_text())["log"]
    names = {"step": "step", "loss": "loss", "rewards/accuracies": "pairs ranked rightly", "rewards/margins": "margin"}
    names |= {"likeness": "mean cosine", "mean_token_accuracy": "tokens of chosen replies right"}
    return pd.DataFrame(entries)[list(names)].rename(columns=names)


def defended_folder(study: Study, recipe: Recipe, pairs: Sequence[Pair]) -> Path:
    """Where the defended model is kept, named by what decides its weights: a folder that `lib.models.load` opens."""
    n_layers = len(anatomy(study.model).blocks)
    if not 0 <= recipe.tau <= n_layers:
        raise ValueError(f"tau {recipe.tau} is not valid: {study.name} has {n_layers} layers; choose 1 to {n_layers}")
    own = prompts.load("organism") if study.prompt_set == "organism" else ()
    if len(disjoint(pairs, [*study.prompts, *own])) < len(pairs):
        raise ChoiceError("some preference pairs are evaluation prompts: drop them with defence.disjoint")
    calibrated = recipe.perturbation is not None and recipe.perturbation.needs_calibration
    content = {
        "weights": study.identity["weights"],
        "recipe": recipe.described(),
        "pairs": [vars(pair) for pair in pairs],
        "protocol": [study.protocol, study.tokenizer.chat_template, study.identity["tokenizer"]],
        "calibration": study.calibration_texts if calibrated else None,
        "numbers": [str(study.model.dtype), study.model.device.type, study.identity["attention"]],
        "code": source_hash(*CODE, *technique_modules(recipe.perturbation)),
    }
    return study.store.folder / "defended" / content_key(content)
