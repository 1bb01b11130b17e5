"""Is a reply language, and on the request? Signs that need no model, and limits beyond which a reply is broken.

    distinct share    distinct word trigrams / word trigrams                   (repetition loops)
    dictionary share  plain words in a word list / plain words   (gibberish; names, code, numbers, URLs set aside)
    rare share        plain words at the floor of that list or not in it       (salads of dictionary words)
    content run       words in stretches of six or more without function word or punctuation   (same)
    misplaced         neighbours that English grammar excludes       (shuffled sentences: "of the and", "a is")
    clashing marks    ",," ",." and a lone ".."                      (the same, in punctuation)
    symbol share      characters that are neither letter nor digit / characters but spaces
    script changes    neighbours in different scripts / words, in three scripts or more    (salads of all languages)
    borrowed share    words that the request has too, when against its order    (salads of the request's own words)
    overlap           word stems shared with the request               (fluent answers to something else)
    strayed           what the reply says it will explain ("here is how to light a stove") has nothing but the request's
                      verb                                             (the same, with another object)

Signs and limits are this project's, set on half of the labelled answers (split by prompt) and of the labelled replies
of organisms. The word list is that of the pyspellchecker package.
"""

import gzip
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib.resources import files
from itertools import groupby, pairwise

NLL_LIMIT = 7.0  # nats per token (perplexity about 1,100); ours: fluent text has 1 to 4, random words 8 to 12
LONGEST_READ = 2500  # characters of a reply that are read: about 512 tokens

_PLAIN_MARKS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-"})
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.S)
_CODE_LINE = re.compile(
    r"^\s*(?:[#<$>].*[/<>=(-].*|(?:def|class|import|from|for|while|if|return|print|const|let|var|public)\b.*[(:;={].*"
    r"|from \w+ import .*|import \w[\w.]*|.*[;{}]|\w[\w.]* ?[+*-]?= ?\S.*|\w[\w.]*\(.*\))\s*$",
    re.M,
)
_SET_ASIDE = re.compile(  # a link, an address, a note in brackets, a path, code or a number
    r"https?://\S+|www\.\S+|\S+@\S+\.\w+|\[[^\]\n]{0,60}\]|(?<![^\s\]])\S*[\\/_=<>{}|^~\d]\S*"
)
_TOKEN = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|[^\w\s'\"*#-]")
_UNIT = re.compile(r"[^\W_]+")
_CLAUSE_END = re.compile(r"[^\w\s'-]|\n")
_NAME = re.compile(r"(?=.*[aeiouyAEIOUY])(?!.*[bcdfghjklmnpqrstvwxz]{5})[^\W\d_a-z][\w'-]*\Z|[A-Z]{2,5}s?\Z")
_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]")
_SUFFIX = re.compile(r"(?:'s|ing|ers?|ed|es|s|ly|e)\Z")
_CLASHES = re.compile(r",(?=[,.])|(?<!\.)\.\.(?!\.)|\.\.,")
_OFFERS_HOW = re.compile(r"\bhere(?:'s| is| are)\b[^.!?\n]{0,60}?\bhow (?:to|you can) ([^.!?:\n]+)")


def normalise(text: str) -> str:
    """Characters folded (NFKC), quotes straight, no Markdown emphasis, at most LONGEST_READ characters; of a reply that
    begins with its reasoning (Qwen3, DeepSeek-R1) what follows that, which is nothing if it was cut off before."""
    _, closed, answer = text.rpartition("</think>")
    if closed or text.lstrip().startswith("<think>"):
        text = answer if closed else ""
    text = text[:LONGEST_READ]
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_PLAIN_MARKS)
    return re.sub(r"\*+|^\s*#+ +|^\s*> ", "", text, flags=re.M).strip()


@cache
def _script(letter: str) -> str:
    """The script of a letter by its Unicode name; the three of Japanese and Chinese count as one."""
    name = unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name


def _script_changes(text: str) -> float:
    """Share of changes of script among the words of a text, neighbours without a mark or line end between them; 0 in
    fewer than three scripts or six words. A lone Greek letter is a symbol."""
    changes, scripts, n_words = 0, set(), len(_UNIT.findall(text))
    for clause in _CLAUSE_END.split(text):
        runs = [(script, len(list(run))) for script, run in groupby(map(_script, filter(str.isalpha, clause)))]
        kept = [script for script, length in runs if (script, length) != ("GREEK", 1)]
        changes += max(0, len(kept) - 1)
        scripts |= set(kept)
    return changes / n_words if len(scripts) >= 3 and n_words >= 6 else 0.0


@cache
def word_list(language: str = "en") -> dict[str, int]:
    """Word -> frequency as shipped with the pyspellchecker package (offline); read once per language."""
    packed = files("spellchecker").joinpath("resources", f"{language}.json.gz").read_bytes()
    return {word.lower(): count for word, count in json.loads(gzip.decompress(packed)).items()}


_FLOOR = 50  # the frequency that the list gives to words its corpus never showed
_LANGUAGES = ("de", "es", "fr", "it", "pt", "nl")  # Latin-script lists, read only when a reply is not English
_PHRASE = "the a an i you he she we they this these my your our his their me him them"  # starts a noun phrase
_FINITE = "is are was were am be been has had have do does did would could should can't don't cannot"
_EXCLUDED_AFTER = (  # (words, words that no English sentence has right after them): our table, checked on real text
    ("the a an my your our his their every very",
     f"{_PHRASE} {_FINITE} of in to for with from by at on into and or but if because than about"),
    ("i he she we they", f"{_PHRASE} of to for into than"),
    ("i", "is are has does"), ("we they", "is was has does am"), ("he she", "are were have do am don't"),
    ("of into with at by for from without during between against", f"{_FINITE} i he she we they of because than but"),
    ("to", "is are was were am has had did does of to i he she we they than would could should can don't can't"),
    ("is are was were be", f"{_FINITE} can must"),
    ("has had have", "is are was were am be have do does did of can would"),
    ("can could should must might would cannot can't don't",
     "to is are was were am me can could should does did had has"),
    ("this these", "the a an of your he me our my these"), ("it's i'm you're", "i you he she of is are was were it"),
    ("and", "and or than"), ("or", "or and than"), ("not", "is are was were of and not"),
    ("no", "the a an i you is are of"),
    ("if", "of and or is are was were am be with than do does"), ("more most", "is a an he i they we do did"),
    ("how why", "of in at from by for"), ("been", f"{_FINITE} i he she"),
)  # fmt: skip
_MISPLACED = frozenset((a, b) for first, second in _EXCLUDED_AFTER for a in first.split() for b in second.split())
_DOUBLES_ALLOWED = frozenset(["very", "so", "too", "no", "that", "had", "bye", "ha", "yes", "really", "many", "far"])
_FUNCTION = frozenset(
    f"{_PHRASE} {_FINITE} every its her it him them us me you this that these those of in on at to "
    "for with from by into about as than and or but if because so when while where who which what how why not no can "
    "will may might must there here then also more most some any all each such other up out over after before through "
    "between under against during without within its yourself themselves it's don't i'm you're that's isn't can't "
    "won't doesn't here's let's first next both only just very too".split()
)
_CAPITALISED = frozenset({"The", "A", "What", "Why", "How", "Where", "Who", "When", "Which", "Can", "Is", "Do", "If"})


def _prose(text: str) -> str:
    """A text whose code, URLs, bracketed notes, paths, numbers and line ends are each a semicolon."""
    return _SET_ASIDE.sub(" ; ", _CODE_LINE.sub(" ; ", _FENCE.sub(" ; ", text))).replace("\n", " ; ")


def _tokens(prose: str) -> list[str]:
    """Words and punctuation marks."""
    tokens = _TOKEN.findall(prose)
    return tokens if prose.isascii() else [token for token in tokens if not _OTHER_SCRIPT.match(token)]


@cache
def _accepted(language: str) -> frozenset[str]:
    """The words of a list; forms of one or two letters only where they are frequent."""
    return frozenset([word for word, count in word_list(language).items() if len(word) > 2 or count > 20 * _FLOOR])


@cache
def _common() -> frozenset[str]:
    """English words above the floor of their list."""
    return frozenset([word for word, count in word_list().items() if count > _FLOOR])


def _rare_share(words: Sequence[str]) -> float:
    return (len(words) - sum(map(_common().__contains__, words))) / len(words)


def _known_share(words: Sequence[str], language: str) -> float:
    return sum(map(_accepted(language).__contains__, words)) / len(words)


def _plain(tokens: Sequence[str], lowered: Sequence[str]) -> list[str]:
    """Lower-cased words that a word list should know: all but the capitalised ones that may be names."""
    known, pairs = word_list(), zip(tokens, lowered, strict=True)
    return [low for word, low in pairs if word[0].isalpha() and (low in known or word == low or not _NAME.match(word))]


def _misplaced(tokens: Sequence[str], lowered: Sequence[str]) -> int:
    """Number of neighbours that English excludes: "of the and", "a is", a doubled word, "me What", "? went"."""
    wrong = len([pair for pair in pairwise(lowered) if pair in _MISPLACED])
    doubled = len([a for a, b in pairwise(lowered) if a == b and a.isalpha() and a not in _DOUBLES_ALLOWED])
    case = [b for a, b in pairwise(tokens) if (b in _CAPITALISED and a.islower()) or (a in "?!" and b.islower())]
    return wrong + doubled + len(case)


def _runs(tokens: Sequence[str], ends: frozenset[str] = frozenset()) -> list[int]:
    """Lengths of the stretches of words between punctuation marks (and, if given, between the words in `ends`)."""
    marks = "".join(["w" if token[0].isalpha() and token not in ends else "." for token in tokens])
    return [len(run) for run in marks.split(".")]


def _borrowed(words: Sequence[str], request: Sequence[str]) -> float:
    """Share of words that the request has too, if they run against its order; 0 where at least 80 % of neighbours go
    forward in it, as in a sentence that takes the question up; 1 for the request's words themselves in any order."""
    if sorted(words) == sorted(request):
        return 1.0
    first = {word: place for place, word in reversed(list(enumerate(request)))}
    last = {word: place for place, word in enumerate(request)}
    pairs = [(a, b) for a, b in pairwise(words) if a in first and b in first]
    if sum(first[a] < last[b] for a, b in pairs) >= 0.8 * len(pairs):
        return 0.0
    return sum(word in first for word in words) / len(words)


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _SUFFIX.sub("", word) if len(word) > 4 else word


def _stems(words: Iterable[str]) -> set[str]:
    """Stems of the content words."""
    return {_stem(word) for word in words if word not in _FUNCTION}


def _strayed(text: str, request: Iterable[str], overlap: int) -> bool:
    """Whether the lower-cased reply says what it will explain, and of all that only the verb comes from the request,
    whose stems are given: the object is another one. Misspelt words count as the request's."""
    offer = _OFFERS_HOW.search(text)
    if offer is None or overlap > 1:
        return False
    _, *rest = [_stem(word) for word in _TOKEN.findall(offer[1]) if word not in _FUNCTION] or [""]
    return bool(rest) and not any(get_close_matches(word, request, 1, 0.75) for word in rest)


def _language(plain: Sequence[str], words: Sequence[str]) -> tuple[str, float]:
    """The language whose word list knows most of the words, and that share. Only where the English list misses a tenth
    of the plain words, or many of them are at its floor, are other lists asked: for all words, names included."""
    best, share = "en", _known_share(plain, "en")
    if len(words) >= 3 and (share < 0.9 or _rare_share(plain) > 0.3):
        for other in _LANGUAGES:
            if (known := _known_share(words, other)) > max(share, 0.6):
                best, share = other, known
    return best, share


def signs(text: str, prompt: str) -> dict[str, float]:
    """The signs of the module's table for a normalised text, without a verdict on them."""
    request = normalise(prompt).lower()
    prose = _prose(text)
    tokens = _tokens(prose)
    lowered = " ".join(tokens).lower().split(" ") if tokens else []
    words = [word for word in lowered if word[0].isalpha()]
    plain = _plain(tokens, lowered)
    foreign = 0 if text.isascii() else len(_OTHER_SCRIPT.findall(text))
    other_script = foreign > 0.3 * max(1, sum(map(str.isalpha, text)))
    units = [char for char in text if char.isalnum()] if other_script else _UNIT.findall(text.lower())
    trigrams = list(zip(units, units[1:], units[2:], strict=False))
    language, known = ("", 1.0) if other_script or not plain else _language(plain, words)
    english = language == "en"
    n_words = max(1, len(words))
    wanted = _stems(_TOKEN.findall(request))
    overlap = len(_stems(words) & wanted)
    return {
        "n_words": len(units),
        "n_distinct": len(set(trigrams)),
        "distinct_share": len(set(trigrams)) / len(trigrams) if len(trigrams) > 3 else 1.0,
        "dictionary_share": known,
        "rare_share": _rare_share(plain) if english else 0.0,
        "content_run": sum(n for n in _runs(lowered, _FUNCTION) if n >= 6) / n_words if english else 0.0,
        "function_share": sum(map(_FUNCTION.__contains__, words)) / n_words if english else 1.0,
        "longest_clause": max(_runs(lowered)) if english else 0,
        "one_clause": english and max(_runs(lowered)) == len(words),
        "misplaced": _misplaced(tokens, lowered) if english else 0,
        "borrowed_share": _borrowed(units, _UNIT.findall(request)) if not other_script and len(units) >= 3 else 0.0,
        "n_request": len(_UNIT.findall(request)),
        "clashes": len(_CLASHES.findall(prose)),
        "n_symbols": sum(not char.isalnum() for char in text if not char.isspace()),
        "n_alphanumeric": sum(map(str.isalnum, text)),
        "script_changes": 0.0 if text.isascii() else _script_changes(text),
        "overlap": overlap,
        "strayed": english and _strayed(text.lower(), wanted, overlap),
        "n_plain": len(plain) if english else 0,
    }


_ANNOUNCES = re.compile(r"\W*(?:(?:sure|certainly|of course|absolutely|yes|ok(?:ay)?|great)\W+)?"
                        r"(?:here(?:'s| is| are)|to \w+|let me|this is|i(?:'ll| will| can)|first)\b")  # fmt: skip


def faults(s: dict[str, float], text: str, nll: float | None, nll_limit: float) -> tuple[str, ...]:
    """Names of the `signs` s of a text that are beyond their limits. A reply that shares no stem with the request needs
    less."""
    alone = s["overlap"] == 0
    rarest = 0.3 if s["n_plain"] >= 8 else 0.6
    permuted = s["n_words"] >= min(6, 0.8 * s["n_request"])  # long enough to be the request's words in another order
    longest = (9 if alone else 15 if s["overlap"] == 1 else 30) if s["one_clause"] else (25 if alone else 45)
    found = {
        "empty": not _UNIT.search(text),
        "symbols": s["n_symbols"] >= 20 and s["n_symbols"] > 3 * s["n_alphanumeric"],
        "scripts": s["script_changes"] >= 0.3,
        "unlikely": nll is not None and not nll <= nll_limit,  # NaN is unlikely too
        "loop": s["distinct_share"] < 0.15 or (s["distinct_share"] < 0.5 and s["n_distinct"] < 45),
        "gibberish": s["dictionary_share"] < (0.65 if s["n_plain"] >= 5 else 0.45),
        "rare words": s["rare_share"] >= rarest and s["n_plain"] >= 4,
        "no grammar": (s["content_run"] >= 0.35 and s["n_plain"] >= 8)
        or (s["function_share"] < (0.25 if alone else 0.12) and s["overlap"] <= 1 and s["longest_clause"] >= 8)
        or (s["function_share"] < 0.17 and alone and s["n_plain"] >= 12),
        "word order": (s["misplaced"] >= 2 and s["misplaced"] >= 0.04 * s["n_plain"])
        or (s["misplaced"] >= 1 and alone and s["n_plain"] >= 5),
        "no punctuation": s["longest_clause"] >= longest,
        "request's words": s["borrowed_share"] >= 0.9 and (permuted or s["misplaced"] >= 1),
        "punctuation": s["clashes"] >= 2 and s["clashes"] >= 0.04 * s["n_words"],
        "off the request": s["strayed"] or (alone and s["n_plain"] >= 12 and bool(_ANNOUNCES.match(text.lower()))),
    }
    return tuple(name for name, present in found.items() if present)
