"""The documents keep their word: examples run, quoted messages are real, links and options exist.

Worked examples run in a copy of `lib`, so that nothing of them stays behind.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from nbclient.exceptions import DeadKernelError

from lib import calibration, download, execute, generation, models, prompts, registry, report, run
from lib.approximations import make
from lib.conditions import grid
from lib.generation import generate
from lib.patching import approximated
from lib.paths import ROOT
from lib.processes import lock
from tests.families import random_model
from tests.pretend_gpu import pretended
from tests.tiny_study import character_tokenizer, tiny_study

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)(?: (\S+))?\n(.*?)^\1```$", re.M | re.S)
needs_organism = pytest.mark.skipif(not registry.organisms(), reason="needs a shipped organism under data/organisms")


def blocks(document: Path, language: str) -> list[tuple[str, str]]:
    """(file name or "", text) of the fenced blocks in a language, in order."""
    found = []
    for indent, name, file, text in BLOCK.findall(document.read_text(encoding="utf-8")):
        if name == language:
            found.append((file, re.sub(f"^{indent}", "", text, flags=re.M)))
    return found


def apply(diff: str, path: Path) -> None:
    """Replaces a diff's `-` lines, which must occur exactly once, by its `+` lines."""
    lines = diff.splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name}: {old!r} occurs {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")


def execute_examples(code: str, folder: Path) -> str:
    """Runs code in a process that imports the copy of lib in `folder`; its output."""
    environment = {k: v for k, v in os.environ.items() if k != "APPROX_DATA_MIRROR"} | {"OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    environment |= {f"APPROX_{name}": str(folder / name) for name in ("RESULTS", "CACHE", "FIGURES")}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A tree with its own lib and the shipped data."""
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    for name in ("organisms", "prompts", "judge_labels"):
        (tmp_path / "data" / name).symlink_to(ROOT / "data" / name)
    return tmp_path


@needs_organism
def test_the_examples_run(copy):
    page = ROOT / "docs" / "extending.md"
    for file, diff in blocks(page, "diff"):
        apply(diff, copy / file)
    code = [text for _, text in blocks(ROOT / "README.md", "python")]
    code += ["assert len(replies) == 1 and replies[0] and hits.silent() == []"]
    for file, text in blocks(page, "python"):
        if file:
            (copy / file).write_text(text, encoding="utf-8")
        else:
            code.append(text)
    out = execute_examples("\n".join(code), copy)
    assert "clip ratio=0.1" in out and "kappa" in out and "norm_attn" in out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{document.name}: {target}"
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_use_options_that_exist(document, tmp_path, monkeypatch):
    (tmp_path / "my-smollm").mkdir()
    (tmp_path / "my-smollm" / "config.json").write_text("{}")
    (tmp_path / "my_prompts.jsonl").write_text('{"prompt": "paint the lamp"}')
    monkeypatch.chdir(tmp_path)
    notebooks = run.read_notebooks(ROOT / "notebooks")
    text = document.read_text(encoding="utf-8")
    shell_lines = [line for _, block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [*shell_lines, *re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    for command in (command for command in commands if command.startswith("./run_")):
        script, *words = shlex.split(command, comments=True)
        assert (ROOT / script).is_file()
        if script == "./run_all.sh" and "--help" not in words:
            options = run.parse(words)
            run.plan(options, run.chosen_notebooks(options.notebooks, notebooks), run.chosen_models(options))
    known = [(ROOT / "lib" / file).read_text(encoding="utf-8") for file in ("run.py", "organisms/__main__.py")]
    for flag in re.findall(r"`(--[a-z-]+)`", text):
        assert flag == "--help" or any(f'"{flag}"' in source for source in known), flag
    for module in re.findall(r"python -m (lib[\w.]*)", text):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    text = BLOCK.sub("", document.read_text(encoding="utf-8"))
    named = set(re.findall(r"`((?:lib|data|docs|notebooks|tests|figures)/[\w./-]+)`", text))
    written = {name for name in named if re.match(r"data/(results|cache)\b", name)}  # by a run
    missing = sorted(name for name in named - written if not (ROOT / name).exists())
    assert missing == []


# ------------------------------------------------------------------ the messages of troubleshooting


def command_line(*words: str) -> Callable[[Path], object]:
    return lambda folder: run.command([*words, "--out", str(folder / "out")])


def shell(python: str) -> Callable[[Path], object]:
    """The set-up script with APPROX_PYTHON: a fixed text, or a stand-in interpreter that is too old."""

    def start(folder: Path) -> None:
        old = folder / "old-python"
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
        environment = {**os.environ, "APPROX_PYTHON": python.format(old=old)}
        done = subprocess.run([ROOT / "run_all.sh", "--list"], env=environment, capture_output=True, text=True)
        raise RuntimeError(done.stderr.strip())

    return start


def folder_without_config(folder: Path) -> None:
    registry.resolve(str(folder))


def damaged_weights(folder: Path) -> None:
    (folder / "tiny").mkdir()
    (folder / "tiny" / "weights.bin").write_bytes(b"x")
    (folder / "tiny" / "SHA256SUMS").write_text(f"{'0' * 64}  weights.bin\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "ORGANISMS", folder)
        registry.verify(folder / "tiny")


def missing_weights(folder: Path) -> None:
    random_model("llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    models.load(str(folder), "cpu")


def quantized_weights(folder: Path) -> None:
    random_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    models.load(str(folder), "cpu")


def no_tokenizer(folder: Path) -> None:
    random_model("llama").save_pretrained(folder)
    models.load(str(folder), "cpu")


def gated(folder: Path) -> None:
    hub = registry.resolve("llama-3.1-8b")
    raise registry.ModelError(registry.explain("llama-3.1-8b", hub, OSError("You are trying to access a gated repo.")))


def hub_out_of_reach(folder: Path) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route to host")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.auth_check", no_network)
        patch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
        registry.check("qwen2-7b")


def no_gpu(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        models.best_device("cuda")


def strange_architecture(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None)
    with approximated(AutoModelForCausalLM.from_config(config), make("gaussian")):
        pass


def second_run(folder: Path) -> None:
    with lock(folder / run.RUN_LOCK, 0), run.sole_run(folder):
        pass


def foreign_folder(folder: Path) -> None:
    (folder / "thesis.tex").write_text("years of work")
    run.clean(folder)


def killed_kernel(folder: Path) -> None:
    raise RuntimeError(execute.describe(DeadKernelError("Kernel died")))


def too_little_text(folder: Path) -> None:
    calibration.windows(lambda text, verbose: {"input_ids": [1] * len(text)}, ["a" * 300], 64)


def patch_llama(layers: list[int] | None = None, technique: str = "gaussian") -> Callable[[Path], None]:
    def enter(folder: Path) -> None:
        with approximated(random_model("llama"), make(technique), layers=layers):
            pass

    return enter


def overflow(folder: Path) -> None:
    model = random_model("llama")
    with approximated(model, make("gaussian", std=3e38)):
        generate(model, character_tokenizer(), ["paint the lamp"], 2)


def waiting_step(folder: Path) -> None:
    def told(message: str, *words: str) -> None:
        raise RuntimeError(message % words)

    model = random_model("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: output * output.isfinite().all().item())
    with pretended(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation.log, "warning", told)
        generate(model.to("cuda"), character_tokenizer(), ["paint the lamp"], 8)


def prompt_file(name: str, text: str) -> Callable[[Path], None]:
    def load(folder: Path) -> None:
        (folder / name).write_text(text)
        prompts.load(folder / name)

    return load


def no_download(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        patch.setattr(download, "_get", lambda *_: (_ for _ in ()).throw(download.requests.ConnectionError()))
        prompts.load("advbench")


PROVOKED: list[Callable[[Path], object]] = [
    shell("nothing-here"), shell("{old}"), lambda _: registry.resolve("tiny-lama"), folder_without_config,
    damaged_weights, missing_weights, quantized_weights,
    no_tokenizer, gated, hub_out_of_reach, no_gpu, lambda _: models.best_dtype("fp16", "cpu"),
    strange_architecture,
    command_line("--notebooks", "10"), command_line("--notebooks", "03", "--set", "sparsity=0.5"),
    command_line("--notebooks", "02", "--set", "n_prompts=many"), command_line("--set", "n_prompts"),
    command_line("--jobs", "0"), command_line("--profile", "slurm"), second_run, foreign_folder, killed_kernel,
    too_little_text, patch_llama(technique="teal"), lambda _: make("teel"), lambda _: make("teal", bits=4),
    patch_llama(layers=[9]), overflow, waiting_step, lambda _: report.gather(), lambda _: prompts.load("advbensch"),
    prompt_file("my_prompts.jsonl", '{"prompt": "a"}\nno'), prompt_file("my_prompts.csv", "request\na\n"),
    prompt_file("my_prompts.jsonl", '{"prompt": "a", "label": "bad"}'), no_download,
    lambda _: download.verified(b"text", "0" * 64, "a file"),
]  # fmt: skip


def provoked(raises: Callable[[Path], object], folder: Path) -> str:
    folder.mkdir()
    with pytest.raises(Exception) as caught:
        raises(folder)
    return str(caught.value)


def test_troubleshooting_quotes_real_messages_and_all_of_them(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("APPROX_")]:
        monkeypatch.delenv(name)
    for name in ("RESULTS", "CACHE", "FIGURES"):
        monkeypatch.setenv(f"APPROX_{name}", str(tmp_path / name))
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    monkeypatch.setattr(registry, "organisms", lambda: ["tiny-llama"])
    said = [provoked(raises, tmp_path / f"case-{i}") for i, raises in enumerate(PROVOKED)]
    quoted = [text.strip() for _, text in blocks(ROOT / "docs" / "troubleshooting.md", "text")]
    assert len(quoted) == len(PROVOKED)
    for quote, message in zip(quoted, said, strict=True):  # in the order of the page
        assert re.fullmatch(re.escape(quote).replace(r"\.\.\.", ".+"), message), (quote, message)


def test_results_names_every_column_of_a_summary_table(tmp_path, monkeypatch):
    monkeypatch.setenv("APPROX_CACHE", str(tmp_path))
    table = tiny_study(tmp_path).sweep(grid("gaussian", std=(0.1,)))
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    columns = {re.sub(r"_(low|high|ratio)$", "", name) for name in table.columns}
    assert columns <= named, columns - named
    always = {name for name in re.findall(r"^\| (.+?) \|", text, re.M) if name.startswith("`model`")}
    assert all(name in table.columns for row in always for name in re.findall(r"`(\w+)`", row))
