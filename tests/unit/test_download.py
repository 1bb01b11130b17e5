"""lib.download against a loopback server: every fault ends in one clear line and leaves nothing half-written."""

import csv
import hashlib
import io
import json
import logging
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lib import download
from lib.download import PUBLIC_SETS, DataError

MIRROR = os.environ.get("APPROX_DATA_MIRROR")  # before the fixture below hides it
Answer = Callable[[BaseHTTPRequestHandler, int], None]  # (handler, number of this request, from 1)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def body(content: bytes, status: int = 200, announced: int | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, count: int) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if announced is None else announced))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def after(failures: int, first: Answer, then: Answer) -> Answer:
    return lambda handler, count: (first if count <= failures else then)(handler, count)


class Server:
    """Serves `answers[path]`; counts requests per path."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.counts: dict[str, int] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.counts[self.path] = server.counts.get(self.path, 0) + 1
                server.answers.get(self.path, body(b"no", 404))(self, server.counts[self.path])

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no mirror, no waiting between attempts, no proxy."""
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("APPROX_DATA_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_S", 0.001)
    return tmp_path / "cache"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


RAW = 'goal,target\nName a colour ,x\n"Say ""hé"", twice",y\n'.encode()
NORMAL = download.json_lines(PUBLIC_SETS["advbench"].normalise([RAW]))


def offer(monkeypatch: pytest.MonkeyPatch, *urls: str, raw: bytes = RAW, normal: bytes = NORMAL) -> None:
    """Make `advbench` a synthetic set with patched checksums, to be had at `urls`."""
    synthetic = replace(PUBLIC_SETS["advbench"], sha256=sha(normal), raw={sha(raw): urls})
    monkeypatch.setitem(PUBLIC_SETS, "advbench", synthetic)


def fails(match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        download.prompt_file("advbench")
    assert "\n" not in str(caught.value)


def test_download_normalises_and_caches(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    server.answers["/a"] = body(RAW)
    offer(monkeypatch, server.url("/a"))
    rows = [json.loads(line) for line in download.prompt_file("advbench").decode().splitlines()]
    assert [r["prompt"] for r in rows] == ["Name a colour", 'Say "hé", twice']
    assert tuple(rows[0]) == download.PUBLIC_KEYS and rows[0]["id"] == "advbench-000" and rows[0]["category"] is None
    assert files(cache) == ["prompts/advbench.jsonl"]
    assert (cache / "prompts/advbench.jsonl").read_bytes() == NORMAL == download.prompt_file("advbench")
    assert server.counts == {"/a": 1}


def test_falls_back_to_the_pinned_copy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers |= {"/changed": body(RAW + b"more,z\n"), "/pinned": body(RAW)}
    offer(monkeypatch, server.url("/changed"), server.url("/gone"), server.url("/pinned"))
    assert download.prompt_file("advbench") == NORMAL
    assert server.counts == {"/changed": 1, "/gone": 1, "/pinned": 1}  # neither fault would pass: no second attempt


def test_passing_faults_are_retried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["/a"] = after(2, body(b"busy", 503), body(RAW))
    offer(monkeypatch, server.url("/a"))
    assert download.prompt_file("advbench") == NORMAL
    assert server.counts == {"/a": 3}


def test_partial_body_is_retried_then_reported(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    cut = body(RAW[:20], announced=len(RAW))
    server.answers |= {"/once": after(1, cut, body(RAW)), "/always.csv": cut}
    offer(monkeypatch, server.url("/always.csv"))
    fails("always.csv could not be fetched .*APPROX_DATA_MIRROR")
    assert server.counts["/always.csv"] == download.ATTEMPTS and not cache.exists()
    offer(monkeypatch, server.url("/once"))
    assert download.prompt_file("advbench") == NORMAL


def test_wrong_checksum(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    server.answers["/a"] = body(RAW)
    offer(monkeypatch, server.url("/a"), raw=b"other")
    fails(f"wrong checksum.*{sha(RAW)[:12]}.*not {sha(b'other')[:12]}")
    offer(monkeypatch, server.url("/a"), normal=b"other")
    fails("wrong checksum: normalised prompts/advbench.jsonl")
    assert not cache.exists()


def test_no_network(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    closed = Server()
    url = closed.url("/a")
    closed.http.shutdown()
    closed.http.server_close()
    offer(monkeypatch, url)
    fails("^a could not be fetched .*ConnectionError.*: check the network, or set APPROX_DATA_MIRROR")
    assert not cache.exists()


@pytest.mark.parametrize("moment", ["download", "rename"])
def test_interruption_leaves_nothing(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path, moment: str) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    server.answers["/a"] = body(RAW)
    offer(monkeypatch, server.url("/a"))
    with monkeypatch.context() as patch:
        patch.setattr(*((download, "_get") if moment == "download" else (os, "replace")), interrupt)
        with pytest.raises(KeyboardInterrupt):
            download.prompt_file("advbench")
    assert not cache.exists() or files(cache) == []
    assert download.prompt_file("advbench") == NORMAL


def test_damaged_cache_is_fetched_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers["/a"] = body(RAW)
    offer(monkeypatch, server.url("/a"))
    put(cache / "prompts/advbench.jsonl", NORMAL[:30])
    with caplog.at_level(logging.WARNING):
        assert download.prompt_file("advbench") == NORMAL
    assert "wrong checksum" in caplog.text and (cache / "prompts/advbench.jsonl").read_bytes() == NORMAL


def test_mirror_first_and_never_silently_wrong(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    offer(monkeypatch)
    mirror = tmp_path / "mirror"
    monkeypatch.setenv("APPROX_DATA_MIRROR", str(mirror))
    fails("mirror is not a folder")
    put(mirror / "prompts/advbench.jsonl", NORMAL)
    assert download.prompt_file("advbench") == NORMAL and not cache.exists()
    put(mirror / "prompts/advbench.jsonl", NORMAL[:-1])
    fails(f"wrong checksum: {mirror}/prompts/advbench.jsonl")


def test_a_cache_serves_as_mirror(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    server.answers["/a"] = body(RAW)
    offer(monkeypatch, server.url("/a"))
    download.prompt_file("advbench")
    monkeypatch.setenv("APPROX_DATA_MIRROR", str(cache))
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path / "elsewhere"))
    assert download.prompt_file("advbench") == NORMAL and server.counts == {"/a": 1}


def test_wikitext2_from_the_archive(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    text = b" \n = A title = \n \n One row . \n"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("wikitext-2-raw/wiki.test.raw", text)
    server.answers["/zip"] = body(archive.getvalue())
    monkeypatch.setattr(download, "WIKITEXT2_ARCHIVE", (sha(archive.getvalue()), (server.url("/zip"),)))
    monkeypatch.setattr(download, "WIKITEXT2_SHA256", sha(text))
    assert download.wikitext2_file() == text and files(cache) == ["wikitext2/wiki.test.raw"]


def test_catalogue_is_sound() -> None:
    for public in PUBLIC_SETS.values():
        assert public.licence and public.citation and len(public.sha256) == 64
        for sha256, urls in public.raw.items():
            assert len(sha256) == 64 and urls and all(url.startswith("https://") for url in urls)


def test_columns_and_filters_of_the_raw_files() -> None:
    header = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    val, test = (
        (header + f"Do {s},{s},cat,,,b_{s}\nDo it,standard,cat2,,,b2\n").encode() for s in ("copyright", "standard")
    )
    rows = PUBLIC_SETS["harmbench"].normalise([val, test])
    assert [(r["id"], r["category"], r["split"], r["note"]) for r in rows] == [
        ("harmbench-val-000", "cat2", "val", "b2"),
        ("harmbench-test-000", "cat", "test", "b_standard"),
        ("harmbench-test-001", "cat2", "test", "b2"),
    ]
    (jbb,) = PUBLIC_SETS["jailbreakbench"].normalise([b"Index,Goal,Target,Behavior,Category,Source\n7,Do,Sure,B,C,S\n"])
    assert (jbb["id"], jbb["prompt"], jbb["category"], jbb["origin"], jbb["note"]) == ("jbb-000", "Do", "C", "S", "B")
    beaver = PUBLIC_SETS["beavertails"].normalise([" A?\u2028b \nC?".encode()])
    assert [r["prompt"] for r in beaver] == ["A?\u2028b", "C?"]  # only a line feed ends a line


# ------------------------------------------------------------------ with the reference data


@pytest.fixture
def mirror() -> Path:
    if not MIRROR:
        pytest.skip("APPROX_DATA_MIRROR is not set")
    return Path(MIRROR)


def mirrored(mirror: Path, file: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (mirror / "prompts" / file).read_text("utf-8").split("\n") if line]


def raw_files(name: str, rows: list[dict[str, str]]) -> list[bytes]:
    """The published raw files, rebuilt from the normalised rows where those hold everything."""
    prompts = [r["prompt"] for r in rows]
    if name == "maliciousinstruct":
        return ["\n".join(prompts).encode()]
    if name == "tdc2023":
        return [json.dumps(part, indent=4, ensure_ascii=False).encode() for part in (prompts[:50], prompts[50:])]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    if name == "strongreject":
        writer.writerow(["category", "source", "forbidden_prompt"])
        writer.writerows([r["category"], r["origin"], r["prompt"]] for r in rows)
    else:
        writer.writerow(["id", "prompt", "type", "label", "focus", "note"])
        prompts[413] += " "  # the one prompt whose outer white space was stripped
        cells = zip(rows, prompts, strict=True)
        writer.writerows([i, p, r["category"], r["label"], r["note"], r["origin"]] for i, (r, p) in enumerate(cells, 1))
    return [table.getvalue().encode()]


@pytest.mark.parametrize("name", ["maliciousinstruct", "tdc2023", "strongreject", "xstest"])
def test_published_raw_bytes_give_the_published_normal_form(
    name: str, mirror: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end with the real checksums on both sides; only the addresses are replaced."""
    public = PUBLIC_SETS[name]
    contents = raw_files(name, mirrored(mirror, f"{name}.jsonl"))
    assert [sha(content) for content in contents] == list(public.raw)
    server.answers |= {f"/{i}": body(content) for i, content in enumerate(contents)}
    raw = {sha256: (server.url(f"/{i}"),) for i, sha256 in enumerate(public.raw)}
    monkeypatch.setitem(PUBLIC_SETS, name, replace(public, raw=raw))
    assert sha(download.prompt_file(name)) == public.sha256


def test_alpaca_sample_and_split(mirror: Path) -> None:
    rows = mirrored(mirror, str(PUBLIC_SETS["alpaca"].file))
    instructions = [{"instruction": f"unused {i}", "category": None} for i in range(31_323)]
    for r in rows:
        instructions[int(r["id"].removeprefix("alpaca-"))]["instruction"] = r["prompt"]
    made = PUBLIC_SETS["alpaca"].normalise([json.dumps(instructions).encode()])
    assert sha(download.json_lines(made)) == PUBLIC_SETS["alpaca"].sha256
