"""Published figures of the studied paper, for rows that were measured as it measured them.

arXiv:2502.00840, Table 1: Llama-3.1-8B-Instruct, ASR by keywords on AdvBench (520 requests, replies of 128 new tokens),
perplexity on WikiText-2. Our `quada` protocol is that of the released code with the deviations that `lib.prompts`
lists. Its HS and MMLU come from other judges and tasks than ours and are left out.
"""

from __future__ import annotations

import json

import pandas as pd

from lib.registry import REGISTRY

MODEL, PROMPT_SET, PROTOCOL, NEW_TOKENS = "meta-llama/Llama-3.1-8B-Instruct", "advbench", "quada", 128
NAMES = {MODEL, *(name for name, entry in REGISTRY.items() if entry.hub == MODEL)}  # of that model in our tables
SYSTEM = "published"  # the series of private-inference systems as their authors published them
METHODS = {SYSTEM, "last half of prompt", "whole prompt", "greedy, whole prompt", "paper thresholds"}
METHODS |= {"per token", "per tensor, static", "per tensor, dynamic", "learned"}
"""Series that may be what was published; plain rounding, other parts or degrees, and decoding alone are not."""
TABLE_1: dict[tuple[str, float | None], tuple[float, float]] = {  # (technique, level): (ASR in percent, perplexity)
    ("iron", None): (58.07, 43.74),
    ("bolt", None): (35.76, 15.81),
    ("bumblebee", None): (20.56, 11.28),
    ("nexus", None): (21.15, 12.93),
    ("teal", 0.10): (5.00, 8.05),
    ("teal", 0.25): (28.85, 8.09),
    ("teal", 0.50): (57.12, 8.57),
    ("teal", 0.90): (0.02, 206.47),
    ("smoothquant", 8): (41.92, 9.56),
    ("smoothquant", 4): (55.19, 10.35),
    ("omniquant", 8): (33.46, 9.85),
    ("omniquant", 4): (47.11, 10.79),
}
"""Level: sparsity or activation bits; None for a private-inference system as its authors published it."""


def beside(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `published_asr` (a share, by keywords) and `published_perplexity`; NaN where they do not apply."""
    found = [_lookup(row) for row in table.to_dict("records")]
    return table.assign(published_asr=[asr / 100 for asr, _ in found], published_perplexity=[ppl for _, ppl in found])


def _lookup(row: dict) -> tuple[float, float]:
    nothing = (float("nan"), float("nan"))
    same = (row["protocol"], row["prompt_set"], row["layers"]) == (PROTOCOL, PROMPT_SET, "all")
    if not same or row["variant"] not in METHODS or row["model"] not in NAMES:
        return nothing
    if json.loads(row["provenance"])["max_new_tokens"] != NEW_TOKENS:
        return nothing
    level = None if row["variant"] == SYSTEM else row["level"]
    return TABLE_1.get((row["technique"], level), nothing)
