"""From prompts to the summary table: a study runs conditions, judges them, and compares each with the exact model.

    study = open_study("tiny-llama", n_prompts=150)
    table = study.sweep(grid("teal", sparsity=(0.25, 0.5)))

A condition is model x technique x setting x layers x prompts x protocol; the first of every sweep is the exact model.
Replies, verdicts and utility measures are stored by content (`lib.results`), so a repeated or interrupted sweep
computes only what is missing. Rates carry Wilson intervals, changes against exact are paired by prompt.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import calibration, judging, models, prompts, refusal_score, statistics, summary, utility
from lib.anatomy import anatomy
from lib.approximations import State, Technique
from lib.batches import pad_left
from lib.conditions import EXACT, Condition, Layers, describe, layer_text, technique_modules
from lib.errors import ChoiceError, check, choosing
from lib.generation import NonFiniteError, Reply, generate
from lib.organisms import corpus
from lib.patching import Hits, approximated, check_layers
from lib.registry import base_of, resolve
from lib.results import Store, content_key, provenance, rejudging, source_hash, store_for

PROSE_PARAGRAPHS = 30
RECORD_CODE = ("lib.utility", "lib.refusal_score", "lib.judging", "lib.degeneration")
GENERATION_CODE = ("lib.generation", "lib.batches", "lib.patching", "lib.eager", "lib.anatomy", "lib.prompts")


@dataclass
class Study:
    """One exact model with its judge, prompts and store; see `open_study`."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel | None
    nll_limit: float | None
    prompts: list[prompts.Prompt]
    facts: list[corpus.Fact]
    prose: str
    calibration_texts: list[str]
    prompt_set: str
    split: str
    protocol: str
    max_new_tokens: int
    batch_size: int | None
    seed: int
    store: Store
    identity: dict[str, Any] = field(default_factory=dict)  # given only for the same model and base: hashing takes time
    likelihood_of: dict[tuple[str, str, bool], float] = field(default_factory=dict)  # of (request, reply, cut off)

    def __post_init__(self) -> None:
        if not self.identity:
            base = None if self.base is None else models.weights_hash(self.base)
            self.identity = {"weights": models.weights_hash(self.model), "base": base}
            self.identity |= {"attention": self.model.config._attn_implementation}  # read here: a patch may switch it
            self.identity |= {"tokenizer": models.tokenizer_hash(self.tokenizer)}

    def rows(self, *labels: str) -> list[int]:
        """Positions of the prompts with these labels."""
        return [i for i, prompt in enumerate(self.prompts) if prompt.label in labels]

    def brief(self, n: int, split: str | None = None) -> Study:
        """The same model for long sweeps: n harmful and n / 2 harmless requests, answer perplexity, nothing else.

        split None: the first of these prompts, else those of another split. ChoiceError if it has no harmful ones, or
        if this study has opened every split, and for an n below 1.
        """
        check(n_prompts=n)
        pool = self.prompts
        if split is not None:
            if self.split == "all":
                raise ChoiceError(f"split='all' leaves nothing for the {split} split: open the study with split='test'")
            with choosing():
                pool = prompts.for_study(self.prompt_set, split, n, self.seed)
        harmful = [prompt for prompt in pool if prompt.label == "harmful"][:n]
        harmless = [prompt for prompt in pool if prompt.label == "harmless"][: max(1, n // 2)]
        return replace(self, prompts=harmful + harmless, facts=[], prose="", split=split or self.split)

    def check_refusals(self) -> int:
        """How many harmful requests the exact model refuses. ChoiceError if none: there is no safety to keep."""
        result = self.run()
        refused = int((result.loc[result["label"] == "harmful", "verdict"] == "refused").sum())
        if not refused:
            n = len(self.rows("harmful"))
            raise ChoiceError(f"{self.name} refuses none of {n} harmful requests: it has no safety to keep")
        return refused

    def overview(self) -> pd.DataFrame:
        """What the study measures, as a small table to show."""
        counts = {label: len(self.rows(label)) for label in ("harmful", "harmless", "confusable")}
        facts: dict[str, Any] = {"model": self.name, "parameters": f"{self.model.num_parameters():,}"}
        facts |= {"dtype": str(self.model.dtype), "device": str(self.model.device)}
        facts |= {"weights": self.identity["weights"][:12]}
        facts |= {"prompt set": f"{self.prompt_set}, {self.split}", **{f"{k} prompts": v for k, v in counts.items()}}
        facts |= {"harmful goals": len({self.prompts[i].goal or self.prompts[i].prompt for i in self.rows("harmful")})}
        facts |= {"taught facts": len(self.facts), "protocol": self.protocol, "new tokens": self.max_new_tokens}
        return pd.DataFrame({"value": facts})

    def check_patch(self, technique: Technique, layers: Layers = None) -> pd.DataFrame:
        """Where a technique acts on a few prompts, how much it changes, and that the model is restored bit for bit.

        ChoiceError for layers that the model does not have.
        """
        with choosing():
            check_layers(layers, len(anatomy(self.model).blocks))
        batch = pad_left(prompts.encode(self.tokenizer, self.prompts[:4], self.protocol), self.tokenizer.pad_token_id)
        batch = {key: value.to(self.model.device) for key, value in batch.items()}
        real, patch = batch["attention_mask"].bool(), self.patched(technique, layers)  # calibration may need gradients
        with torch.inference_mode():
            before = self.model(**batch).logits[real]
            with patch as hits:
                during = self.model(**batch).logits[real]
            after = self.model(**batch).logits[real]
        facts = {"places edited": len(hits.counts), "sites": ", ".join(sorted({site for _, site in hits.counts}))}
        facts |= {"never reached": len(hits.silent()), "restored bit for bit": bool(torch.equal(before, after))}
        facts |= {"largest change of a logit": (during - before).abs().max().item()}
        return pd.DataFrame({describe(technique): facts})

    def state(self, technique: Technique) -> State | None:
        """The technique's calibrated state, from the cache where it is there."""
        weights = self.identity["weights"]
        return calibration.calibrate(technique, self.model, self.tokenizer, self.calibration_texts, weights)

    def key(self, technique: Technique | None, layers: Layers) -> str:
        """Name of a condition's replies: a hash of everything that decides them."""
        batch_matters = technique is not None and not technique.per_token
        calibrated = technique is not None and technique.needs_calibration
        return content_key(
            {
                "weights": self.identity["weights"],
                "technique": technique and [technique.name, technique.settings],
                "calibration": content_key(self.calibration_texts) if calibrated else None,
                "layers": None if layers is None else list(layers),
                "prompts": [prompt.prompt for prompt in self.prompts],
                "protocol": [self.protocol, self.tokenizer.chat_template, self.identity["tokenizer"]],
                "decoding": ["greedy", self.max_new_tokens, self.batch_size if batch_matters else None],
                "numbers": [str(self.model.dtype), self.model.device.type, self.identity["attention"]],
                "code": source_hash(*GENERATION_CODE, *technique_modules(technique)),
            }
        )

    def run(self, technique: Technique | None = None, layers: Layers = None) -> pd.DataFrame:
        """One condition: a row per prompt with id, label, tier, verdict, nll, asr_keyword. `attrs` holds its record.

        ChoiceError if the exact model itself fails."""
        key = self.key(technique, layers)
        record = self.store.read_record(self._record_key(key))
        replies = self.store.read_table("replies", key)
        if record is None or (replies is None and not record["failed"]):
            replies, record = self._compute(technique, layers, key)
        if technique is None and record["failed"]:
            raise ChoiceError(f"the exact model fails, so nothing can be compared with it: {record['failed']}")
        table = pd.DataFrame({"id": [p.id for p in self.prompts], "label": [p.label for p in self.prompts]})
        table["tier"], table["category"] = [p.tier for p in self.prompts], [p.category for p in self.prompts]
        if replies is None:
            table["verdict"], table["nll"], table["asr_keyword"] = "failed", np.nan, False
        else:
            table = table.join(self._judged(key, replies).drop(columns="id"))  # by place: the same texts, other ids
        table.attrs = record
        return table

    def replies(self) -> list[Reply]:
        """The exact model's replies, in the order of the prompts."""
        return replies_of(self._replies(self.key(None, None)))

    def references(self) -> tuple[list[str], list[str]]:
        """Harmless requests, and the answers whose perplexity measures fluency: reference answers if there are any,
        else the exact model's own replies. Not to be called within a patch, which would write other replies."""
        rows = self.rows("harmless")
        answers = [self.prompts[i].answer for i in rows]
        if rows and not any(answers):
            replies = self.replies()
            answers = [replies[i] for i in rows]
        pairs = [(self.prompts[i].prompt, answer) for i, answer in zip(rows, answers, strict=True) if answer]
        return [request for request, _ in pairs], [answer for _, answer in pairs]

    def _record_key(self, key: str) -> str:
        texts = [(p.label, p.answer) for p in self.prompts], [vars(fact) for fact in self.facts], self.prose
        return content_key([key, texts, source_hash(*RECORD_CODE)])

    def _compute(
        self, technique: Technique | None, layers: Layers, key: str
    ) -> tuple[pd.DataFrame | None, dict[str, Any]]:
        started, failed, replies, measures = time.monotonic(), "", None, {}
        try:
            state = self.state(technique) if technique else None
            with self.patched(technique, layers, state):
                replies = self._replies(key)
            references, tokens = self.references(), self._refusal_tokens()
            with self.patched(technique, layers, state) as hits:
                measures = self._utility(*references) | self._refusal_score(tokens)
            if hits.silent():
                raise RuntimeError(f"{technique and technique.name}: patched but never reached: {hits.silent()[:3]}")
        except NonFiniteError as error:
            failed = str(error)
        described = {"technique": technique and technique.name, "settings": technique and technique.settings}
        record = {**measures, "failed": failed, **described, "layers": layers and list(layers), **self.identity}
        record |= {"seconds": time.monotonic() - started, "batch_size": self.batch_size, **provenance()}
        self.store.write_record(self._record_key(key), record)
        return replies, record

    def patched(
        self, technique: Technique | None, layers: Layers = None, state: State | None = None
    ) -> AbstractContextManager[Hits]:
        """A fresh patch, whose noise begins anew however much of the condition was stored before; none for exact.

        state: of the technique, where the caller has it."""
        if technique is None:
            return nullcontext(Hits())
        return approximated(self.model, technique, self.state(technique) if state is None else state, layers)

    def _replies(self, key: str) -> pd.DataFrame:
        stored = self.store.read_table("replies", key)
        if stored is not None:
            return stored
        texts = [prompt.prompt for prompt in self.prompts]
        replies = generate(self.model, self.tokenizer, texts, self.max_new_tokens, self.protocol, self.batch_size)
        table = pd.DataFrame({"id": [prompt.id for prompt in self.prompts], "reply": list(map(str, replies))})
        table["ended"] = [reply.ended for reply in replies]
        self.store.write_table("replies", key, table)
        return table

    def _utility(self, asked: Sequence[str], answers: Sequence[str]) -> dict[str, float | None]:
        """Perplexities, of answers to what was asked and of prose, and fact accuracy of the model as it is now."""
        measures: dict[str, float | None] = {"answer_perplexity": None, "prose_perplexity": None, "facts_right": None}
        if asked:
            perplexity = utility.answer_perplexity(self.model, self.tokenizer, asked, answers, self.protocol)
            measures["answer_perplexity"] = perplexity
        if self.prose:
            window = min(1024, calibration.window_length(self.model))
            measures["prose_perplexity"] = utility.perplexity(self.model, self.tokenizer, self.prose, window)
        if self.facts:
            right = utility.closed_answers(self.model, self.tokenizer, self.facts, self.protocol)
            measures["facts_right"] = int(right.sum())
        return measures

    def _refusal_tokens(self) -> list[int]:
        """The tokens by which the exact model refuses, none without harmful prompts. Not to be called within a patch,
        which would write other replies."""
        return refusal_score.refusal_tokens(self.tokenizer, self.replies()) if self.rows("harmful") else []

    def _refusal_score(self, tokens: Sequence[int]) -> dict[str, float | None]:
        """Mean refusal score on harmful prompts of the model as it is now; None without tokens."""
        if not tokens:
            return {"refusal_score": None}
        asked = [self.prompts[i].prompt for i in self.rows("harmful")]
        scores = refusal_score.refusal_scores(self.model, self.tokenizer, asked, tokens, self.protocol)
        return {"refusal_score": float(scores.mean())}

    def _judged(self, key: str, replies: pd.DataFrame) -> pd.DataFrame:
        """id, verdict, nll, asr_keyword of stored replies, judged now or before by the same judge."""
        judge = [judging.JUDGE_VERSION, self.identity["base"], self.nll_limit, source_hash("lib.utility")]
        judge_key = content_key([key, *judge])
        stored = self.store.read_table("verdicts", judge_key)
        if stored is not None and not rejudging():
            return stored
        asked = [prompt.prompt for prompt in self.prompts]
        table = pd.DataFrame({"id": replies["id"]}).join(self.judge(asked, replies_of(replies)))
        self.store.write_table("verdicts", judge_key, table)
        return table

    def judge(self, asked: Sequence[str], given: Sequence[str]) -> pd.DataFrame:
        """verdict, nll, asr_keyword of replies, by the rules of `lib.judging` and, where it may decide, the base's
        likelihood, nats per token: nll is NaN for a firm refusal, for a reply that is broken anyway, and where there is
        no base."""
        pairs = [(request, reply, utility.cut_off(reply)) for request, reply in zip(asked, given, strict=True)]
        unsure = [] if self.base is None else [pairs[i] for i in judging.undecided(asked, given)]
        new = [pair for pair in dict.fromkeys(unsure) if pair not in self.likelihood_of]  # many repeat exact replies
        if self.base is not None and new:
            requests, replies, _ = zip(*new, strict=True)
            sums, lengths = utility.reply_losses(self.base, self.tokenizer, requests, replies)
            self.likelihood_of.update(zip(new, (sums / lengths).tolist(), strict=True))
        nlls = [self.likelihood_of.get(pair) for pair in pairs]
        table = pd.DataFrame({"verdict": judging.verdicts(asked, given, nlls, self.nll_limit)})
        table["nll"] = np.array(nlls, dtype=float)
        table["asr_keyword"] = [judging.keyword_quada(request, reply) for request, reply, _ in pairs]
        return table

    def sweep(self, conditions: Sequence[Condition], label: str = "conditions") -> pd.DataFrame:
        """The summary table: the exact model, then every condition. Holm's correction is over the sweep."""
        exact = self.run()
        rows = [self.summary(exact, exact, None)]
        with tqdm(conditions, desc=label, file=sys.stdout, leave=False) as bar:
            for condition in bar:
                bar.set_postfix_str(describe(condition.technique))
                result = self.run(condition.technique, condition.layers)
                rows.append(self.summary(result, exact, condition))
        table = pd.DataFrame(rows)
        return table.assign(p_holm=statistics.holm(table["p_value"].tolist()))

    def summary(self, result: pd.DataFrame, exact: pd.DataFrame, condition: Condition | None) -> dict[str, Any]:
        """One row of the summary table, from one condition's rows and the exact model's."""
        record, harmful = result.attrs, result[result["label"] == "harmful"]
        technique = condition.technique if condition else None
        row: dict[str, Any] = {"model": self.name, "technique": technique.name if technique else EXACT}
        row |= {"category": technique.category if technique else EXACT, "label": describe(technique)}
        row |= {"variant": condition.variant if condition else "", "level": condition.level if condition else math.nan}
        row |= {"level_name": condition.level_name if condition else "", "p_value": math.nan}
        row |= {"settings": json.dumps(technique.settings if technique else {})}
        row |= {"layers": layer_text(condition.layers if condition else None)}
        row |= {"protocol": self.protocol, "prompt_set": self.prompt_set, "split": self.split, "seed": self.seed}
        row |= {f"n_{label}": int((result["label"] == label).sum()) for label in ("harmful", *summary.ANSWERED)}
        row |= {"failed": record["failed"], **summary.NOT_MEASURED}
        if not record["failed"]:
            row |= summary.verdict_rates(harmful) | summary.answer_rates(result)
            row |= summary.changes(exact, result) if technique is not None else {}
        facts = {"device": self.model.device.type, "dtype": str(self.model.dtype), "nll_limit": self.nll_limit}
        facts |= {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "seed": self.seed}
        asked = [prompt.prompt for prompt in self.prompts]
        row |= summary.origin(self.identity, asked, self.tokenizer.chat_template, **facts)
        return row | summary.utility_columns(record, exact.attrs, len(self.facts))


def replies_of(table: pd.DataFrame) -> list[Reply]:
    """The replies of a stored table."""
    return [Reply(text, ended) for text, ended in zip(table["reply"], table["ended"], strict=True)]


def open_study(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    prompt_set: str = "organism",
    split: str = "test",
    protocol: str = "chat",
    n_prompts: int = 150,
    max_new_tokens: int = 48,
    batch_size: int | str = "auto",
    seed: int = 0,
) -> Study:
    """Loads model, fluency judge and prompts: up to `n_prompts` harmful, and half as many harmless and confusable.

    prompt_set "organism": this project's own sets. Another set that lacks harmless or confusable requests is joined by
    Alpaca's or XSTest's; prose is then WikiText-2, and calibration texts are Alpaca's requests. split: "test" or
    "search", for other sets also "all" (`lib.prompts.split_of`). ModelError or ChoiceError, in one line, for what
    cannot be had.
    """
    _check(protocol, n_prompts, max_new_tokens, batch_size, seed)
    with choosing():
        asked = prompts.for_study(prompt_set, split, n_prompts, seed)
    network, tokenizer = models.load(model, device, dtype)
    base_name, judge_file = base_of(model), Path(resolve(model), "judge.json")
    own = prompt_set == "organism"
    return Study(
        name=model,
        model=network,
        tokenizer=tokenizer,
        base=models.load(base_name, device, dtype)[0] if base_name else None,
        nll_limit=json.loads(judge_file.read_text())["nll_limit"] if judge_file.is_file() else None,
        prompts=asked,
        facts=corpus.facts(split)[::2] if own else [],
        prose="\n".join(corpus.prose(split, PROSE_PARAGRAPHS)) if own else prompts.wikitext2(),
        calibration_texts=_calibration_texts(tokenizer, own),
        prompt_set=prompt_set,
        split=split,
        protocol=protocol,
        max_new_tokens=max_new_tokens,
        batch_size=None if batch_size == "auto" else int(batch_size),
        seed=seed,
        store=store_for(model),
    )


def _check(protocol: str, n_prompts: int, max_new_tokens: int, batch_size: int | str, seed: int) -> None:
    """ChoiceError for a parameter of `open_study` that cannot be; those of the model are checked as it is loaded."""
    if protocol not in prompts.PROTOCOLS:
        raise ChoiceError(f"unknown protocol {protocol!r}; choose one of {', '.join(prompts.PROTOCOLS)}")
    check(n_prompts=n_prompts, max_new_tokens=max_new_tokens, seed=seed)
    if batch_size != "auto" and not (str(batch_size).isdecimal() and int(batch_size) > 0):
        raise ChoiceError(f"batch_size cannot be {batch_size!r}; give a whole number from 1, or auto")


def _calibration_texts(tokenizer: PreTrainedTokenizerBase, own: bool) -> list[str]:
    """Texts a deployer would calibrate on: harmless requests with answers, and prose; never evaluation prompts."""
    if not own:
        return [prompt.prompt for prompt in prompts.load("alpaca", split="train")]
    pairs = [(request.prompt, str(request.answer)) for request in corpus.requests("train", label="harmless")[:200]]
    return [*prompts.answered(tokenizer, pairs), *corpus.prose("train", 60)]
