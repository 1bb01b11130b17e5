"""Names of models, and whether a model can be had, without importing torch: the organisms shipped here, the paper's
ten LLMs, Gemma, any folder or hub id. `lib.models` loads what is named here."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import PlainError
from lib.paths import ORGANISMS


@dataclass(frozen=True)
class Entry:
    """A known model. revision: the hub's commit that is loaded. gigabytes: weights at 16 bits. system: whether the chat
    template takes a system turn. alpha: SmoothQuant's for its family: 0.85 for Llama and 0.80 for Mistral and Mixtral
    in its released code, which lists no other of these: they have Llama's, and Zephyr Mistral's.

    gaussian_range: largest std of the paper's norm-noise curve for this model, None where it shows none.
    Licences, gating and templates are the hub's as the authors remember them, to be checked when a model is fetched.
    """

    hub: str
    revision: str
    licence: str
    gated: bool
    gigabytes: float
    system: bool
    alpha: float = 0.85
    gaussian_range: float | None = None


META, APACHE = "meta-llama", "Apache-2.0"
REGISTRY: dict[str, Entry] = {
    "llama-2-7b": Entry(
        f"{META}/Llama-2-7b-chat-hf", "f5db02db724555f92da89c216ac04704f23d4590",
        "Llama 2", True, 13.5, True, 0.85, 0.09,
    ),
    "llama-2-13b": Entry(
        f"{META}/Llama-2-13b-chat-hf", "a2cb7a712bb6e5e736ca7f8cd98167f81a0b5bd8",
        "Llama 2", True, 26.0, True, 0.85, 0.09,
    ),
    "llama-3.1-8b": Entry(
        f"{META}/Llama-3.1-8B-Instruct", "0e9e39f249a16976918f6564b8830bc894c89659",
        "Llama 3.1", True, 16.1, True, 0.85, 0.15,
    ),
    "phi-3-mini": Entry(
        "microsoft/Phi-3-mini-4k-instruct", "0a67737cc96d2554230f90338b163bc6380a2a85",
        "MIT", False, 7.6, True, 0.85, 0.08,
    ),
    "phi-3.5-mini": Entry(
        "microsoft/Phi-3.5-mini-instruct", "2fe192450127e6a83f7441aef6e3ca586c338b77",
        "MIT", False, 7.6, True, 0.85, 0.07,
    ),
    "mistral-7b": Entry(
        "mistralai/Mistral-7B-Instruct-v0.3", "c170c708c41dac9275d15a8fff4eca08d52bab71",
        APACHE, True, 14.5, True, 0.80, 0.40,
    ),
    "mixtral-8x7b": Entry(
        "mistralai/Mixtral-8x7B-Instruct-v0.1", "eba92302a2861cdc0098cc54bc9f17cb2c47eb61",
        APACHE, True, 93.4, False, 0.80, 0.80,
    ),
    "zephyr-7b": Entry(
        "HuggingFaceH4/zephyr-7b-beta", "892b3d7a7b1cf10c7a701c60881cd93df615734c", "MIT", False, 14.5, True, 0.80, 0.50
    ),
    "qwen2-7b": Entry(
        "Qwen/Qwen2-7B-Instruct", "f2826a00ceef68f0f2b946d945ecc0477ce4450c", APACHE, False, 15.2, True, 0.85, 0.58
    ),
    "qwen2.5-32b": Entry(
        "Qwen/Qwen2.5-32B-Instruct", "5ede1c97bbab6ce5cda5812749b4c0bdf79b18dd", APACHE, False, 65.5, True, 0.85, 0.40
    ),
    "gemma-2-2b": Entry("google/gemma-2-2b-it", "299a8560bedf22ed1c72a8a11e7dce4a7f9f51f8", "Gemma", True, 5.2, False),
    "gemma-2-9b": Entry("google/gemma-2-9b-it", "11c9b309abf73637e4b6f9a3fa1e92e615547819", "Gemma", True, 18.5, False),
    "gemma-3-1b": Entry("google/gemma-3-1b-it", "dcc83ea841ab6100d6b47a070329e1ba4cf78752", "Gemma", True, 2.0, True),
    "gemma-3-270m": Entry(
        "google/gemma-3-270m-it", "ac82b4e820549b854eebf28ce6dedaf9fdfa17b3", "Gemma", True, 0.54, True
    ),
}


class ModelError(PlainError, RuntimeError):
    """A model that cannot be loaded; the message is one line that says what to do."""


def organisms() -> list[str]:
    """Names of the organisms shipped under data/organisms, without their bases."""
    folders = sorted(path.parent.name for path in ORGANISMS.glob("*/config.json"))
    return [name for name in folders if not name.endswith("-base")]


def resolve(name: str) -> str:
    """The folder or hub id behind a name. ModelError for a name that is none of these."""
    if (ORGANISMS / name / "config.json").is_file():
        return str(ORGANISMS / name)
    if name in REGISTRY:
        return REGISTRY[name].hub
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ModelError(f"folder {name!r} holds no model: config.json is missing")
        return name
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    known = ", ".join([*organisms(), *REGISTRY])
    raise ModelError(f"unknown model {name!r}; choose one of {known}, a folder with config.json, or a hub id")


def revision_of(name: str) -> str | None:
    """The hub's commit that is loaded for a registered model; None, the newest, for others."""
    return REGISTRY[name].revision if name in REGISTRY and not (ORGANISMS / name).is_dir() else None


def gigabytes(name: str) -> float | None:
    """Size of the weights: on disk, else at 16 bits, registered or by the hub id ("70B"); None if that does not say."""
    where = resolve(name)
    if Path(where).is_dir():
        return sum(file.stat().st_size for file in Path(where).glob("*.safetensors")) / 1e9
    if name in REGISTRY:
        return REGISTRY[name].gigabytes
    sizes = re.findall(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z])", where.split("/")[1].lower())
    billions = [float(times or 1) * float(size) * {"b": 1, "m": 1e-3}[unit] for times, size, unit in sizes]
    return 2 * billions[0] if billions else None


def smoothing_alpha(name: str) -> float:
    """SmoothQuant's migration strength for a model, by name or hub id: its registered one, else that of Llama."""
    return next((entry.alpha for known, entry in REGISTRY.items() if name in (known, entry.hub)), Entry.alpha)


def base_of(name: str) -> str | None:
    """An organism's model before alignment, in the folder beside it, a neutral judge of fluency; None for others."""
    return f"{name}-base" if Path(f"{resolve(name)}-base", "config.json").is_file() else None


def check(name: str) -> None:
    """Whether a model can be had, before any work: a folder's checksums, or the hub's permission. ModelError if not."""
    where = resolve(name)
    if Path(where).is_dir():
        return verify(Path(where))
    from httpx import TransportError  # half a second that a run on the organisms need not wait
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(where, "config.json", revision=revision_of(name)), str):
            HfApi().auth_check(where)
    except TransportError as error:
        raise ModelError(f"{name}: {where} is no folder, not in the cache, and the hub cannot be reached") from error
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        raise ModelError(explain(name, where, error)) from error


def explain(name: str, where: str, error: Exception) -> str:
    """One plain line for what the hub or a weight file answered."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, StrictDataclassError

    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in str(error):
        return f"{name}: {where} is gated; accept its licence on the hub, then run 'hf auth login' or set HF_TOKEN"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{name}: no model {where!r} on the hub (or it is private and no token is set); check the spelling"
    unreachable = isinstance(error, ConnectionError) or re.search("connect|cached", str(error).lower())
    if not Path(where).is_dir() and unreachable:
        return f"{name}: {where} is no folder, not in the cache, and the hub cannot be reached: no network?"
    reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return f"{name}: cannot load {where}: {str(reason).strip().splitlines()[0]}"


def verify(folder: Path) -> None:
    """Checks a folder's files against its SHA256SUMS, if it has one. ModelError names the first bad file."""
    listing = folder / "SHA256SUMS"
    if not listing.is_file():
        return
    ours = folder.resolve().is_relative_to(ORGANISMS.resolve())
    remedy = "restore it with 'git checkout -- data/organisms'" if ours else "fetch it again"
    for line in filter(None, map(str.strip, listing.read_text().splitlines())):
        expected, _, file = line.partition(" ")
        path = folder / file.lstrip(" *")  # sha256sum marks files it read as binary by a star
        if not path.is_file():
            raise ModelError(f"{folder.name}: {path.name} is missing; {remedy}")
        if file_hash(path) != expected:
            raise ModelError(f"{folder.name}: {path.name} is damaged (checksum differs); {remedy}")


def file_hash(path: Path) -> str:
    """sha256 of a file, as hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
