"""Public evaluation data: fetched from its original address, verified, normalised and cached; nothing is shipped.

    raw file --sha256--> normalise --sha256--> cache (atomic)      for each public prompt set and for WikiText-2

A set is looked for in this order: the folder named by APPROX_DATA_MIRROR (the normalised files, for machines without
network), the cache (APPROX_CACHE, else `data/cache`), the original address, the pinned copy. Mirror and cache share one
layout, `prompts/<set>.jsonl` and `wikitext2/wiki.test.raw`, so a filled cache serves as a mirror elsewhere.

Normalised prompt files are JSON Lines in UTF-8 with eight keys: id, prompt (stripped of outer white space, otherwise
untouched), category, label, split, origin, note, source; an absent value is null. The pinned copies of six sets and the
harmless sample are those of Arditi et al. (2024, arXiv:2406.11717). Licences: MIT marks of AdvBench, HarmBench,
JailbreakBench, StrongREJECT and TDC 2023 and the BeaverTails licence are recalled, not read in the snapshot used.
"""

import csv
import hashlib
import io
import json
import logging
import os
import random
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm.auto import tqdm

from lib.errors import PlainError
from lib.paths import atomic, cache_folder

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # per address
BACKOFF_S = 0.5  # waits of 0.5, 1, 2 s between attempts
TIMEOUT_S = (10, 60)  # connect, read

Row = dict[str, str | None]
Normalise = Callable[[list[bytes]], list[Row]]
PUBLIC_KEYS = ("id", "prompt", "category", "label", "split", "origin", "note", "source")


class DataError(PlainError, RuntimeError):
    """Data that is missing, damaged or not what its checksum says; the message is one line."""


@dataclass(frozen=True)
class PublicSet:
    """One public prompt set: the sha256 of its normalised file, and how to make that from the files of its authors.

    raw: the sha256 of each such file, and its addresses in order of preference. file: the name of the normalised one,
    where it is not the set's own.
    """

    sha256: str
    raw: Mapping[str, tuple[str, ...]]
    normalise: Normalise
    licence: str
    citation: str
    file: str | None = None


# ------------------------------------------------------------------ normalisation: raw bytes -> rows


def row(id: str, prompt: str, label: str, source: str, category: str = "", **others: str) -> Row:
    """One row of the normalised form; empty cells become None."""
    cells = {"id": id, "prompt": prompt.strip(), "label": label, "source": source, "category": category, **others}
    return {key: cells.get(key) or None for key in PUBLIC_KEYS}


def json_lines(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Rows as JSON Lines: UTF-8, one object and one line feed per row, keys in the order given."""
    return "".join(json.dumps(dict(r), ensure_ascii=False) + "\n" for r in rows).encode("utf-8")


def decoded(content: bytes, where: str) -> str:
    """UTF-8 text without byte order mark; ValueError with the line of the first bad byte."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x})") from None


def _table(raw: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline="")))


def _from_table(id: str, source: str, prompt: str, **columns: str) -> Normalise:
    """Harmful prompts of one CSV file from the column `prompt`; columns: key of the normalised form=column."""
    return lambda raw: [
        row(id.format(i), r[prompt], "harmful", source, **{key: r[column] for key, column in columns.items()})
        for i, r in enumerate(_table(raw[0]))
    ]


def _from_lines(id: str, source: str, label: str) -> Normalise:
    """Prompts of one text file, a line each; blank lines are none."""

    def normalise(raw: list[bytes]) -> list[Row]:
        lines = raw[0].decode("utf-8").replace("\r\n", "\n").split("\n")
        return [row(id.format(i), line, label, source) for i, line in enumerate(filter(str.strip, lines))]

    return normalise


def _harmbench(raw: list[bytes]) -> list[Row]:
    """Validation, then test; `standard` behaviours only (contextual and copyright ones need more than a prompt)."""
    rows = []
    for split, table in zip(("val", "test"), map(_table, raw), strict=True):
        source = f"centerforaisafety/HarmBench:data/behavior_datasets/harmbench_behaviors_text_{split}.csv"
        standard = [r for r in table if r["FunctionalCategory"] == "standard"]
        rows += [
            row(f"harmbench-{split}-{i:03d}", r["Behavior"], "harmful", source, r["SemanticCategory"], split=split,
                note=r["BehaviorID"])
            for i, r in enumerate(standard)
        ]  # fmt: skip
    return rows


def _tdc2023(raw: list[bytes]) -> list[Row]:
    return [
        row(f"tdc2023-{split}-{i:02d}", prompt, "harmful",
            f"centerforaisafety/tdc2023-starter-kit:red_teaming/data/{split}/behaviors.json", split=split)
        for split, behaviours in zip(("dev", "test"), map(json.loads, raw), strict=True)
        for i, prompt in enumerate(behaviours)
    ]  # fmt: skip


def _xstest(raw: list[bytes]) -> list[Row]:
    source = "paul-rottger/xstest:xstest_prompts.csv"
    return [
        row(f"xstest-{int(r['id']):03d}", r["prompt"], r["label"], source, r["type"], origin=r["note"], note=r["focus"])
        for r in _table(raw[0])
    ]


def _alpaca(raw: list[bytes], n: int = 5000) -> list[Row]:
    """`n` of the instructions without input, drawn with seed 0; the split is that of Arditi et al. (2024), a shuffle
    with seed 42 cut at 60 and 80 %. The id carries the row number among all instructions without input."""
    instructions = [r["instruction"] for r in json.loads(raw[0])]
    total = len(instructions)
    shuffled = list(range(total))
    random.Random(42).shuffle(shuffled)
    n_train, n_val = int(0.6 * total), int(0.2 * total)
    split = dict.fromkeys(shuffled, "test")
    split |= dict.fromkeys(shuffled[:n_train], "train") | dict.fromkeys(shuffled[n_train : n_train + n_val], "val")
    source = "tatsu-lab/alpaca (rows with empty input)"
    return [
        row(f"alpaca-{i:05d}", instructions[i], "harmless", source, split=split[i])
        for i in sorted(random.Random(0).sample(range(total), n))
    ]


# ------------------------------------------------------------------ the catalogue

_GITHUB = "https://raw.githubusercontent.com"
_PINNED = f"{_GITHUB}/andyrdt/refusal_direction/9d852fae1a9121c78b29142de733cb1340770cc3/dataset"
_HARMBENCH = f"{_GITHUB}/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text"
_TDC = f"{_GITHUB}/centerforaisafety/tdc2023-starter-kit/main/red_teaming/data"
_QUADA = f"{_GITHUB}/Kevin-Zh-CS/QuadA/9ab6a74ae111318f119781d5bd9c8d94cee93920/benchmark"

PUBLIC_SETS: dict[str, PublicSet] = {
    "advbench": PublicSet(
        "abcb5a8add75337a6692383f5e566ecb20e737ab8dddb119617a44c55a68a956",
        {"6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1": (
            f"{_GITHUB}/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
            f"{_PINNED}/raw/advbench.csv")},
        _from_table(
            "advbench-{:03d}", "llm-attacks/llm-attacks:data/advbench/harmful_behaviors.csv", "goal"),
        "MIT", "Zou et al. 2023, arXiv:2307.15043"),
    "harmbench": PublicSet(
        "d93af53564598f292235e3e5a3faa34c4a2286732664928ab3bdbd7a0f38515a",
        {"7bfaaa5e2b9b95002c89e2d33c019f58e9e8496e2fc65d368f1eeb8179e69534": (
            f"{_HARMBENCH}_val.csv", f"{_PINNED}/raw/harmbench_val.csv"),
         "75d257b3e7428c52eb7b0154318f455af3e01b09a3794b5e2f3d36054f3c0e29": (
            f"{_HARMBENCH}_test.csv", f"{_PINNED}/raw/harmbench_test.csv")},
        _harmbench, "MIT", "Mazeika et al. 2024, arXiv:2402.04249"),
    "jailbreakbench": PublicSet(
        "52d170df9fc8a3cd6894402f2d93621663110d5e7e09a362f5f8312f803bb117",
        {"45e9a8923b28f547bb372fbaa9af7df8b38c818a80ae50c3bab97704197ff516": (
            f"{_GITHUB}/JailbreakBench/jailbreakbench/main/src/jailbreakbench/data/behaviors.csv",
            f"{_PINNED}/raw/jailbreakbench.csv")},
        _from_table(
            "jbb-{:03d}", "JailbreakBench/jailbreakbench:src/jailbreakbench/data/behaviors.csv", "Goal",
            category="Category", origin="Source", note="Behavior"),
        "MIT", "Chao et al. 2024, arXiv:2404.01318"),
    "strongreject": PublicSet(
        "d15a79b752884f18d4a9baaa048368dde82291b87479fa889558cd3fadc0cce9",
        {"4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381": (
            f"{_GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
            f"{_PINNED}/raw/strongreject.csv")},
        _from_table(
            "strongreject-{:03d}", "alexandrasouly/strongreject:strongreject_dataset/strongreject_dataset.csv",
            "forbidden_prompt", category="category", origin="source"),
        "MIT (repository; prompts taken over from other sets: unclear)",
        "Souly et al. 2024, arXiv:2402.10260"),
    "maliciousinstruct": PublicSet(
        "1cdb5c45886b18f8a0f69b4b669679e348f87eae0f3800bb0fc50be21af26308",
        {"a64d69dd1004aac4a23aaff3748fb8f17161893f74db36f45b8bc849eb1bcce5": (
            f"{_GITHUB}/Princeton-SysML/Jailbreak_LLM/main/data/MaliciousInstruct.txt",
            f"{_PINNED}/raw/malicious_instruct.txt")},
        _from_lines(
            "maliciousinstruct-{:03d}", "Princeton-SysML/Jailbreak_LLM:data/MaliciousInstruct.txt", "harmful"),
        "none stated", "Huang et al. 2023, arXiv:2310.06987"),
    "tdc2023": PublicSet(
        "5f4800e8db6295f0443571146129e32c3a3c7a7b73881d0b4c5bcca1aae3698f",
        {"9392c63ad0193f0510f33812593f0dc71d13ae8b2ad93f64d670e9795deee1b0": (
            f"{_TDC}/dev/behaviors.json", f"{_PINNED}/raw/tdc2023_dev_behaviors.json"),
         "c4a630921005fd5e26dfe22dd720e411c8e7866c96f5b1a0ca2d46f0e1d1f8c2": (
            f"{_TDC}/test/behaviors.json", f"{_PINNED}/raw/tdc2023_test_behaviors.json")},
        _tdc2023, "MIT", "Trojan Detection Challenge 2023, red-teaming track, trojandetection.ai"),
    "beavertails": PublicSet(
        "661cb44f8bc7a9cbe84f3b01509ae0b11d44c31f326c4d071daa04096c2219e3",
        {"bfef125acb884f992a7fe74f20f86d9db52b9d1bc016b54c760972a2a7cb9326": (f"{_QUADA}/beavertails.txt",)},
        # not labelled per prompt: many questions are harmless or borderline, so a missing refusal is no failure
        _from_lines("beavertails-{:04d}", "Kevin-Zh-CS/QuadA:benchmark/beavertails.txt", "mixed"),
        "CC-BY-NC-4.0", "Ji et al. 2023, arXiv:2307.04657; selection of arXiv:2502.00840"),
    "xstest": PublicSet(
        "f2b2367da93921ee7b6c356f0bdee0a3676f3d1f9d65af11262af33249367129",
        {"11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a": (
            f"{_GITHUB}/paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv",)},
        _xstest, "CC-BY-4.0", "Röttger et al. 2024 (NAACL), arXiv:2308.01263"),
    "alpaca": PublicSet(
        "5ecc7961d761d79f5c91b5ac848a95f3bd7f39ccf203ab58ff6d08c7b0b10910",
        {"c4ce1bdc5c9b92caabcb171c27c7ec1e79832836bae10291d7c8ab8c6245f600": (f"{_PINNED}/processed/alpaca.json",)},
        _alpaca, "CC-BY-NC-4.0", "Taori et al. 2023 (Stanford Alpaca); splits of arXiv:2406.11717",
        file="alpaca_harmless_5k.jsonl"),
}  # fmt: skip

WIKITEXT2_ARCHIVE = (
    "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ("https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",),
)
WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


# ------------------------------------------------------------------ mirror, cache, network


def prompt_file(name: str) -> bytes:
    """The normalised JSON Lines file of one of PUBLIC_SETS, verified.

    Raises DataError when no copy can be had or a copy fails its checksum.
    """
    public = PUBLIC_SETS[name]

    def build() -> bytes:
        return json_lines(public.normalise([download(*raw) for raw in public.raw.items()]))

    return _obtain(f"prompts/{public.file or f'{name}.jsonl'}", public.sha256, build)


def wikitext2_file() -> bytes:
    """Test split of WikiText-2 raw (Merity et al. 2016, arXiv:1609.07843; CC-BY-SA-3.0 and GFDL), verified."""

    def build() -> bytes:
        with zipfile.ZipFile(io.BytesIO(download(*WIKITEXT2_ARCHIVE))) as archive:
            return archive.read("wikitext-2-raw/wiki.test.raw")

    return _obtain("wikitext2/wiki.test.raw", WIKITEXT2_SHA256, build)


def _obtain(relative: str, sha256: str, build: Callable[[], bytes]) -> bytes:
    """Mirror, else cache, else `build()`, whose result is cached; every path ends at the same checksum."""
    mirror = os.environ.get("APPROX_DATA_MIRROR")
    if mirror:
        if not Path(mirror).is_dir():
            raise DataError(f"APPROX_DATA_MIRROR={mirror} is not a folder")
        if (Path(mirror) / relative).is_file():
            return verified((Path(mirror) / relative).read_bytes(), sha256, f"{mirror}/{relative}")
        logger.info("%s is not in the mirror %s", relative, mirror)
    cached = cache_folder() / relative
    if cached.is_file():
        try:
            return verified(cached.read_bytes(), sha256, str(cached))
        except DataError as error:
            logger.warning("%s; fetching it again", error)
    content = verified(build(), sha256, f"normalised {relative}")
    with atomic(cached) as temporary:
        temporary.write_bytes(content)
    return content


def verified(content: bytes, sha256: str, where: str) -> bytes:
    """`content` unchanged; DataError if its sha256 differs."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"wrong checksum: {where} ({len(content)} bytes) has sha256 {found[:12]}…, not {sha256[:12]}…")
    return content


def download(sha256: str, urls: Sequence[str]) -> bytes:
    """The verified bytes of a file from the first address that has them; passing faults are retried with back-off.

    Raises DataError naming what went wrong at each address.
    """
    import tenacity  # here, so that benchmarks/gpu.py runs on a machine without it

    name, failures = urls[-1].rsplit("/", 1)[1], []
    for url in urls:
        retry = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=BACKOFF_S),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        try:
            return verified(retry(_get, url, name), sha256, url)
        except requests.HTTPError as error:
            failures.append(f"{url}: HTTP status {getattr(error.response, 'status_code', 'unknown')}")
        except requests.RequestException as error:
            failures.append(f"{urlsplit(url).netloc}: {type(error).__name__}")
        except DataError as error:
            failures.append(str(error))
    advice = "check the network, or set APPROX_DATA_MIRROR to a folder that has the normalised files"
    raise DataError(f"{name} could not be fetched ({'; '.join(failures)}): {advice}")


def _get(url: str, name: str) -> bytes:
    """One attempt. A body shorter than announced raises requests.ConnectionError or ChunkedEncodingError."""
    with requests.get(url, stream=True, timeout=TIMEOUT_S, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0)) or None
        chunks = []
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, leave=False) as progress:
            for chunk in response.iter_content(1 << 16):
                chunks.append(chunk)
                progress.update(len(chunk))
        return b"".join(chunks)


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt at the same address makes sense."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, requests.RequestException)
