"""Prompt sets under one schema, users' own files, jailbreak replay, and the two protocols that put prompts to a model.

    load(name or path) -> prompts -> render(tokenizer, prompts, protocol) -> texts to tokenise

Schema (JSON Lines, UTF-8): id, prompt, category, label, split, goal, tier, answer; only `prompt` is required. Every
prompt of a public set or a user's file is in one split (`split_of`).

Protocols: `chat` is the model's own template, `quada` the prompt text of the code released with arXiv:2502.00840.
"""

import csv
import hashlib
import io
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from lib import download
from lib.download import PUBLIC_SETS, decoded
from lib.paths import DATA

logger = logging.getLogger(__name__)

LABELS = ("harmful", "harmless", "confusable", "safe", "unsafe", "mixed")
OWN_SETS = ("organism", "freeform")
NAMES = (*PUBLIC_SETS, *OWN_SETS)
OWN_FOLDER = DATA / "prompts"
SPLITS = {"train": "train", "search": "search", "dev": "search", "val": "search", "test": "test"}
MAX_PROMPT_CHARACTERS = 100_000


@dataclass(frozen=True)
class Prompt:
    """One request. `goal`: the request behind it, shared by rephrasings; `answer`: a reference answer."""

    id: str
    prompt: str
    category: str | None = None
    label: str | None = None
    split: str | None = None
    goal: str | None = None
    tier: str | None = None
    answer: str | None = None


FIELDS = tuple(f.name for f in fields(Prompt))


# ------------------------------------------------------------------ loading


def load(
    name_or_path: str | Path,
    split: str | None = None,
    label: str | None = None,
    tier: str | None = None,
    n: int | None = None,
    seed: int = 0,
) -> tuple[Prompt, ...]:
    """A public set, one of our own, or a user's .jsonl or .csv file; filtered, then at most `n` prompts drawn.

    The draw is stratified by category where there is one, keeps the order, depends on `seed` alone, and a smaller `n`
    gives a subset of a larger one. Raises ValueError for unknown names, bad rows (by line number) and empty results,
    FileNotFoundError, and `lib.download.DataError` when a public set cannot be had intact.
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    prompts = _read(name_or_path)
    for field, wanted in (("split", split), ("label", label), ("tier", tier)):
        if wanted is not None:
            present = sorted({str(getattr(p, field)) for p in prompts})
            prompts = [p for p in prompts if getattr(p, field) == wanted]
            if not prompts:
                name = Path(name_or_path).stem
                raise ValueError(f"{name} has no prompts with {field} {wanted!r}; present: {', '.join(present)}")
    return tuple(prompts if n is None else sample(prompts, n, seed))


def for_study(prompt_set: str, split: str, n: int, seed: int) -> list[Prompt]:
    """Up to n harmful requests, and half as many harmless and confusable ones. ValueError without harmful ones."""
    half = max(1, n // 2)
    counts = {"harmful": n, "harmless": half, "confusable": half}
    if prompt_set == "organism":
        return [p for label, count in counts.items() for p in goals_first(split, label, count, seed)]
    own = [_labelled(p, p.label) for p in load(prompt_set, None if split == "all" else split)]
    found = {label: sample([p for p in own if p.label == label], n, seed) for label, n in counts.items()}
    if not found["harmful"]:
        raise ValueError(f"{prompt_set} has no harmful requests in its {split} split")
    others = "test" if split == "all" else split
    if not found["harmless"]:
        found["harmless"] = [_labelled(p, "harmless") for p in load("alpaca", others, n=half, seed=seed)]
    if not found["confusable"]:
        found["confusable"] = [_labelled(p, "safe") for p in load("xstest", others, "safe", n=half, seed=seed)]
    return [prompt for chosen in found.values() for prompt in chosen]


def _labelled(prompt: Prompt, label: str | None) -> Prompt:
    """With one of the three labels that are judged; harmful if it has none. ValueError for "mixed"."""
    if label == "mixed":
        raise ValueError("this set does not say which of its requests are harmful; choose another prompt_set")
    meaning = {None: "harmful", "unsafe": "harmful", "safe": "confusable"}
    return replace(prompt, label=meaning.get(label, label))


def goals_first(split: str, label: str, n: int, seed: int) -> list[Prompt]:
    """n prompts, nested in larger n: every goal in its first phrasing before any goal in a second one."""
    pool = load("organism", split=split, label=label, tier="composition")
    shuffled = random.Random(f"{split}-{label}-{seed}").sample(pool, len(pool))
    return sorted(shuffled, key=lambda prompt: int(prompt.id.rsplit(".", 1)[1]))[:n]


def wikitext2() -> str:
    """WikiText-2 raw, test split, rows joined by two line feeds as the GPTQ and AWQ family of scripts joins them.

    A row is one line with its own line feed; blank lines are empty rows: 4,358 rows, 1,296,370 bytes, sha256
    696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83.
    """
    rows = io.StringIO(download.wikitext2_file().decode("utf-8"))
    return "\n\n".join(row if row.strip() else "" for row in rows)


def _read(name_or_path: str | Path) -> list[Prompt]:
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in OWN_SETS:
        files = sorted(f for f in OWN_FOLDER.glob("*.jsonl") if ("freeform" in f.name) == (name == "freeform"))
        if not files:
            raise FileNotFoundError(f"no files of the prompt set {name!r} in {OWN_FOLDER}")
        prompts = [p for file in files for p in parse(file.read_bytes(), file.name)]
        _check_unique([p.id for p in prompts], [name] * len(prompts))
        return prompts
    if name in PUBLIC_SETS:
        prompts = parse(download.prompt_file(name), f"{name}.jsonl")
    elif path.suffix.lower() in (".jsonl", ".csv"):
        prompts = parse(path.read_bytes(), path.name)
    else:
        raise ValueError(f"unknown prompt set {name!r}; valid: {', '.join(NAMES)}, or a path to a .jsonl or .csv file")
    return [replace(prompt, split=split_of(prompt)) for prompt in prompts]


def split_of(prompt: Prompt) -> str:
    """train, search or test: what the set itself says, dev and val being for searching; else a quarter, by a hash of
    the goal or the text, is for searching. Rewordings without a common goal can be on both sides."""
    if prompt.split:
        return SPLITS[prompt.split]
    digest = hashlib.sha256((prompt.goal or prompt.prompt).encode()).digest()
    return "search" if digest[0] < 64 else "test"


def sample(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """At most n prompts, every category represented in proportion, in the order given; nested in larger n.

    A random order within each category gives ranks; prompts are taken by (rank + u) / size, u one draw per category.
    """
    if n >= len(prompts):
        return list(prompts)
    generator = np.random.default_rng(seed)
    _, category, size = np.unique([p.category or "" for p in prompts], return_inverse=True, return_counts=True)
    order = np.lexsort((generator.permutation(len(category)), category))
    rank = np.empty(len(category))
    rank[order] = np.arange(len(category)) - np.repeat(np.cumsum(size) - size, size)
    place = (rank + generator.random(len(size))[category]) / size[category]
    return [prompts[i] for i in np.sort(np.argsort(place, kind="stable")[:n])]


# ------------------------------------------------------------------ files: bytes -> checked rows


def parse(content: bytes, file: str) -> list[Prompt]:
    """Prompts of a JSON Lines or (if `file` ends in .csv) CSV file.

    Unknown columns are ignored and logged; rows without an id get one from the file's name. Raises ValueError with the
    number of the first bad line: not UTF-8, not JSON, no prompt, a prompt above 100,000 characters, an unknown label or
    split, a value that is no text, an id seen before; for a file without rows, for a column with other case or spaces.
    """
    text = decoded(content, file)
    records = list((_csv_records if file.lower().endswith(".csv") else _json_records)(text, file))
    if not records:
        raise ValueError(f"{file} has no prompts")
    ignored = sorted({str(key) for _, record in records for key in record} - set(FIELDS))
    for column in ignored:
        if column.strip().lower() in FIELDS:
            raise ValueError(f"{file}: unknown column {column!r}; write {column.strip().lower()!r}")
    if ignored:
        logger.info("%s: columns not used: %s", file, ", ".join(ignored))
    stem = Path(file).stem
    prompts = [_prompt(record, f"{file}, line {line}", f"{stem}-{i:05d}") for i, (line, record) in enumerate(records)]
    _check_unique([p.id for p in prompts], [f"{file}, line {line}" for line, _ in records])
    return prompts


def _prompt(record: dict[str, Any], where: str, default_id: str) -> Prompt:
    values = {field: None if record.get(field) == "" else record.get(field) for field in FIELDS}
    if isinstance(values["id"], int):
        values["id"] = str(values["id"])
    for field, value in values.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {field} must be text, not {type(value).__name__}")
    _check_text(values["prompt"], "prompt", where)
    if values["label"] not in (None, *LABELS):
        raise ValueError(f"{where}: unknown label {values['label']!r}; valid: {', '.join(LABELS)}")
    if values["split"] not in (None, *SPLITS):
        raise ValueError(f"{where}: unknown split {values['split']!r}; valid: {', '.join(SPLITS)}")
    return Prompt(**values | {"id": values["id"] or default_id})


def _check_text(text: str | None, field: str, where: str) -> None:
    if not text or not text.strip():
        raise ValueError(f"{where}: no text under {field!r}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{where}: {field} has {len(text):,} characters, more than {MAX_PROMPT_CHARACTERS:,}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: {field} holds half a surrogate pair, which is not valid Unicode")


def _check_unique(ids: Sequence[str], places: Sequence[str]) -> None:
    seen: set[str] = set()
    for id, place in zip(ids, places, strict=True):
        if id in seen:
            raise ValueError(f"{place}: id {id!r} occurs a second time")
        seen.add(id)


def _json_records(text: str, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {number}: not a JSON object but {type(record).__name__}")
        yield number, record


def _csv_records(text: str, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or ())
        if "prompt" not in columns:
            raise ValueError(f"{file}, line 1: no column 'prompt'; columns: {', '.join(columns) or 'none'}")
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(f"{file}, line {reader.line_num}: not {len(columns)} cells as in the header")
            yield reader.line_num - sum(cell.count("\n") for cell in record.values()), record
    except csv.Error as error:
        reason = f"{error}; prompts have at most {MAX_PROMPT_CHARACTERS:,} characters"
        raise ValueError(f"{file}, line {reader.line_num + 1}: not CSV ({reason})") from None


# ------------------------------------------------------------------ replay of users' jailbreaks


@dataclass(frozen=True)
class Attack:
    """A jailbreak to replay: `template` holds the place `{prompt}` at least once."""

    id: str
    template: str


def load_attacks(path: str | Path) -> list[Attack]:
    """Attacks from JSON Lines with a `suffix` (appended after a space) or a `template` with `{prompt}`; `id` optional.
    Raises ValueError with the number of the first bad line."""
    file = Path(path)
    attacks, places = [], []
    for number, record in _json_records(decoded(file.read_bytes(), file.name), file.name):
        where = f"{file.name}, line {number}"
        kinds = [kind for kind in ("suffix", "template") if isinstance(record.get(kind), str)]
        if len(kinds) != 1:
            raise ValueError(f"{where}: needs a text under either 'suffix' or 'template'")
        kind, text = kinds[0], record[kinds[0]]
        _check_text(text, kind, where)
        if ("{prompt}" in text) != (kind == "template"):
            raise ValueError(f"{where}: a template needs {{prompt}}, a suffix must not have it")
        id = str(record.get("id") or f"{file.stem}-{number}")
        attacks.append(Attack(id, text if kind == "template" else f"{{prompt}} {text}"))
        places.append(where)
    if not attacks:
        raise ValueError(f"{file.name} has no attacks")
    _check_unique([attack.id for attack in attacks], places)
    return attacks


# ------------------------------------------------------------------ protocols

PROTOCOLS = ("chat", "quada")
QUADA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
QUADA_DEVIATIONS = (
    "decoding: greedy; the released code passes no do_sample, so a checkpoint's own, often sampling, settings apply",
    "attention mask: passed; the released code drops it, so left-padded prompts may attend to padding",
    "padding: the tokenizer's own token; the released code sets '[PAD]' for Llama-2 and the end token for Llama-3.1, "
    "Mistral, Mixtral and Zephyr",
    "reply: the new tokens; the released code splits decoded text at markers and cuts Llama-2 at 'Instruction: '",
)
FIXED_DAY = date(2024, 7, 26)  # for templates that print today's date, so that a prompt is the same every day


def messages(prompt: str, protocol: str = "chat") -> list[dict[str, str]]:
    """The conversation that puts `prompt`; a system turn only where the protocol prescribes it (`quada`)."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; valid: {', '.join(PROTOCOLS)}")
    if protocol == "chat":
        return [{"role": "user", "content": prompt}]
    system, request = QUADA_SYSTEM, f"Instruction: {prompt}"
    return [{"role": "system", "content": system}, {"role": "user", "content": request}]


def render(tokenizer: Any, prompts: Iterable[Prompt | str], protocol: str = "chat") -> tuple[list[str], bool]:
    """The texts to tokenise, one per prompt, ending where the reply begins, and whether the tokenizer may add its
    special tokens (False where the template has placed them).

    The model's chat template is used with its generation prompt, a fixed date, and without reasoning where that is an
    option (Qwen3): 128 new tokens hold no answer after it. A system message goes into the user turn where the template
    has no system role. `quada` with Llama-2's chat markup (`<<SYS>>`) or no template at all: plain text
    "<system>\\nInstruction: <prompt>\\nResponse:", as in the released code. `chat` without a template: the plain
    text "User: <prompt>\\nAssistant:", which is logged. Raises ValueError for unknown protocols and a bare text.
    """
    if isinstance(prompts, str):
        raise ValueError(f"one text is no list of prompts: write [{prompts[:20]!r}]")
    conversations = [messages(p if isinstance(p, str) else p.prompt, protocol) for p in prompts]
    if not conversations:
        raise ValueError("no prompts to render")
    template = tokenizer.chat_template
    if template is None or (protocol == "quada" and "<<SYS>>" in str(template)):
        if template is None:
            logger.warning("%s has no chat template: plain text is used", tokenizer.name_or_path or "the tokenizer")
        return [_as_plain_text(conversation, protocol) for conversation in conversations], True

    apply = partial(_applied, tokenizer, add_generation_prompt=True)
    if conversations[0][0]["role"] == "system" and not _takes_system_turn(apply, conversations[0]):
        conversations = [[{"role": "user", "content": f"{s['content']}\n{u['content']}"}] for s, u in conversations]
    return apply(conversations), False


def _applied(tokenizer: Any, conversations: Any, **choices: Any) -> Any:
    """The texts of conversations in the chat template, on the fixed day, without reasoning where that is an option."""
    choices |= {"date_string": FIXED_DAY.strftime("%d %b %Y"), "strftime_now": FIXED_DAY.strftime}
    return tokenizer.apply_chat_template(conversations, tokenize=False, enable_thinking=False, **choices)


def answered(tokenizer: Any, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Conversations of a request and its answer, in the model's chat template or the plain text of `render`."""
    if tokenizer.chat_template is None:
        return [f"{_as_plain_text(messages(request), 'chat')} {answer}" for request, answer in pairs]
    turns = [[*messages(request), {"role": "assistant", "content": answer}] for request, answer in pairs]
    return list(_applied(tokenizer, turns))


def turn_end(tokenizer: Any, ends: Sequence[int]) -> list[int]:
    """The id that ends an answer: the first of the model's end tokens that the chat template puts behind one, else the
    tokenizer's own, if it has one."""
    [text] = answered(tokenizer, [("question", "answer")])
    after = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    found = [token for token in after if token in ends] or [tokenizer.eos_token_id]
    return [token for token in found[:1] if token is not None]


def encode(tokenizer: Any, prompts: Iterable[Prompt | str], protocol: str = "chat") -> list[list[int]]:
    """Token ids of each prompt as `render` writes it."""
    texts, special = render(tokenizer, prompts, protocol)
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


def _as_plain_text(conversation: list[dict[str, str]], protocol: str) -> str:
    user, reply = ("", "Response:") if protocol == "quada" else ("User: ", "Assistant:")
    *system, request = [turn["content"] for turn in conversation]
    return "\n".join([*system, user + request, reply])


def _takes_system_turn(apply: Callable[..., str], conversation: list[dict[str, str]]) -> bool:
    """False if the template refuses a system turn or drops it."""
    try:
        return conversation[0]["content"].strip() in apply(conversation)
    except TemplateError:
        return False
