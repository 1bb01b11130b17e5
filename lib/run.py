"""The command line: checks every word of it, plans the graph of jobs, and hands it to Snakemake (`lib.workflow`).

A job is one notebook for one model; a notebook with a parameter `models` (the report) is one job that waits for all
others. Flags, names, types of settings and folders are checked before any work, and bad input gets one line.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from lib import estimates, prompts, registry
from lib.errors import ChoiceError, check, choosing
from lib.merge import STORED, merge
from lib.parameters import Notebook, UsageError, read_notebooks, settings_for
from lib.paths import ROOT, figures_folder, results_folder, safe_name
from lib.processes import STOPPING
from lib.workflow import RUN_LOCK, Graph, Job, sole_run, visible_gpus

DEFAULT_MODEL = "tiny-llama"
DEMANDING = {"07", "08"}  # unless asked for, on the default model only
INTERACTIVE = {"00"}  # never run unless named
DTYPES = ("auto", "float32", "bfloat16", "float16")  # those of `lib.models`, which takes seconds to import
FREE_BYTES = 10**9
MADE = r"\.(run|snakemake|ipynb|writable|report|main|\d\d).*|logs|figures|report\.html|main_table\.tex|\d\d_.*\.ipynb"
"""Names of what runs put into the results folder, besides the folders of models."""
MADE_OF_A_MODEL = rf"\..*|\d\d_.*\.ipynb|{'|'.join(STORED)}"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """UsageError, where argparse would print its usage and exit."""
        raise UsageError(f"{message}; see ./run_all.sh --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of ./run_all.sh. UsageError for an unknown or malformed one."""
    parser = Parser(prog="./run_all.sh", description="Runs every notebook on every model.", allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", action="extend", metavar="NAME", help="names, folders or hub ids (default: organisms)")
    add("--notebooks", nargs="+", action="extend", metavar="NN", help="for example 01 06 (default: all but 00, and 07 "
        f"and 08 on {DEFAULT_MODEL} only)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebooks; repeatable")
    add("--seed", action="append", dest="set", type="seed={}".format, metavar="N", help="the same as --set seed=N")
    add("--out", type=Path, metavar="FOLDER", help="put results and figures there")
    add("--fast", action="store_true", help=f"{DEFAULT_MODEL} only, small samples (--set fast=true)")
    add("--full", action="store_true", help="every notebook on every model")
    add("--jobs", type=int, metavar="N", help="jobs at a time (default: one per GPU, else 2)")
    add("--profile", metavar="NAME", help="run on a cluster: a folder under profiles/, for example slurm")
    add("--rejudge", action="store_true", help="run every job again; stored replies get fresh verdicts")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--list", action="store_true", help="show models, notebooks and their parameters")
    actions.add_argument("--dry-run", action="store_true", help="show which jobs would run")
    actions.add_argument("--import", type=Path, dest="source", metavar="FOLDER", help="take in another results folder")
    actions.add_argument("--clean", action="store_true", help="delete what runs made in the results folder")
    actions.add_argument("--lab", action="store_true", help="open JupyterLab")
    return parser.parse_args(arguments)


def chosen_notebooks(names: Sequence[str] | None, notebooks: dict[str, Notebook]) -> list[Notebook]:
    """Notebooks by number or full name; if none is named, all but the interactive. UsageError for an unknown one."""
    if names is None:
        return [notebook for number, notebook in notebooks.items() if number not in INTERACTIVE]
    known = {notebook.name: notebook for notebook in notebooks.values()}
    for name in names:
        if name not in notebooks and name not in known:
            raise UsageError(f"unknown notebook {name!r}; choose from {', '.join(known)}")
    return [notebook for notebook in known.values() if {notebook.number, notebook.name} & set(names)]


def chosen_models(options: argparse.Namespace) -> list[str]:
    """Model names as the notebooks get them: folders absolute, each once. ModelError for an unknown one."""
    default = [DEFAULT_MODEL] if options.fast and not options.full else registry.organisms()
    names = [name.rstrip("/") or name for name in options.models or default]
    if not names:
        raise UsageError("no organism under data/organisms; restore it with 'git checkout', or give --models")
    known = [(name, registry.resolve(name)) for name in names]
    own = [os.path.abspath(name) if where == name and Path(name).is_dir() else name for name, where in known]
    return list(dict.fromkeys(own))


def plan(options: argparse.Namespace, notebooks: list[Notebook], models: list[str]) -> list[Job]:
    """The graph: every notebook on every model it is meant for, then the reports. UsageError for an unknown setting."""
    values = settings_for(notebooks, options.set + ["fast=true"] * options.fast)
    for parameters in values.values():
        check_choices(parameters)
    once = set() if options.full or (options.models and options.notebooks) else DEMANDING
    jobs, reports = [], []
    for book in notebooks:
        if book.is_report:
            reports.append(book)
            continue
        for model in models if book.number not in once else set(models) & {DEFAULT_MODEL}:
            key = f"{safe_name(model)}/{book.name}"
            title = f"{book.name} {safe_name(model)}"
            jobs.append(Job(key, title, str(book.path), {"model": model, **values[book.name]}, []))
    after = [job.key for job in jobs]
    for book in reports:
        title = f"{book.name} of {len(models)} model{'s' * (len(models) > 1)}"
        jobs.append(Job(book.name, title, str(book.path), {"models": models, **values[book.name]}, after))
    if not jobs:
        numbers = ", ".join(sorted(once))
        raise UsageError(f"nothing to run: by default {numbers} run on {DEFAULT_MODEL} only; see --full")
    return jobs


def check_choices(parameters: Mapping[str, Any]) -> None:
    """UsageError for a number, list, protocol, dtype, split or prompt set that cannot be. Devices, layers and the names
    of techniques are checked where the job runs."""
    for name, known in {"protocol": prompts.PROTOCOLS, "dtype": DTYPES, "split": ("test", "search", "all")}.items():
        if parameters.get(name, known[0]) not in known:
            raise UsageError(f"unknown {name} {parameters[name]!r}; choose one of {', '.join(known)}")
    prompt_set = parameters.get("prompt_set", "organism")
    if prompt_set == "organism" and parameters.get("split") == "all":
        raise UsageError("split=all is for another prompt_set: of organism's nothing would be left to search on")
    try:
        with choosing():
            check(**parameters)
            if prompt_set not in prompts.NAMES:
                prompts.load(prompt_set)
    except ChoiceError as error:
        raise UsageError(str(error)) from None


def set_folders(options: argparse.Namespace) -> None:
    """Hands folders on to every job by environment, absolute. Altered runs do not draw over a full run's figures.
    UsageError for the repository itself."""
    altered = options.fast or options.set
    if options.out and options.out.resolve() == ROOT:
        raise UsageError("--out is the repository itself: name a folder for this run")
    if options.out:
        os.environ["APPROX_RESULTS"] = str(options.out / "results")
        os.environ["APPROX_FIGURES"] = str(options.out / "figures")
    elif altered:
        os.environ["APPROX_FIGURES"] = os.environ.get("APPROX_FIGURES") or str(results_folder() / "figures")
    os.environ["APPROX_RESULTS"] = str(results_folder())
    os.environ["APPROX_FIGURES"] = str(figures_folder())
    for name in ("APPROX_RESULTS", "APPROX_FIGURES", "APPROX_CACHE", "APPROX_DATA_MIRROR"):
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    if options.rejudge:
        os.environ["APPROX_REJUDGE"] = "1"


def check_folder(folder: Path) -> None:
    """UsageError if files cannot be made or listed in a folder, or if its disk is nearly full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.listdir(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None
    if free < FREE_BYTES:
        raise UsageError(f"{folder} has only {free / 1e6:.0f} MB left and a run needs 1 GB; free some, or use --out")


def check_scale(options: argparse.Namespace) -> None:
    """UsageError for a number of jobs, a cluster or a GPU's memory that cannot be."""
    known = sorted(path.parent.name for path in (ROOT / "profiles").glob("*/config.yaml"))
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: give a number from 1")
    if options.profile is not None and options.profile not in known:
        raise UsageError(f"unknown profile {options.profile!r}; choose from {', '.join(known)}")
    if options.profile == "slurm" and not shutil.which("sbatch"):
        raise UsageError("profile slurm: Slurm's command sbatch is not on this machine")
    memory = os.environ.get("APPROX_GPU_GIGABYTES") or "80"
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?", memory):
        raise UsageError(f"APPROX_GPU_GIGABYTES={memory}: give the memory of one GPU as a number, for example 80")


def check_names(graph: Graph) -> None:
    """UsageError for a name that Snakemake or papermill would take for something else: a placeholder or a flag."""
    files = [str(path) for job in graph.jobs.values() for path in job.files]
    for name in [*graph.jobs, str(graph.results), str(ROOT), *files]:
        if re.search(r"^-|[{}]", name):
            raise UsageError(f"{name}: a path may not contain braces or begin with '-'; rename it")


def show_choices(notebooks: dict[str, Notebook]) -> None:
    """What --list prints."""
    print("Models (besides these, any folder with config.json and any hub id)")
    for name in registry.organisms():
        print(f"  {name:<14} organism, shipped here")
    for name, entry in registry.REGISTRY.items():
        print(f"  {name:<14} {entry.hub}, {entry.gigabytes:g} GB, {entry.licence}{', gated' * entry.gated}")
    print("\nPrompt sets (besides these, any .jsonl or .csv file)")
    for name in prompts.OWN_SETS:
        print(f"  {name:<18} this project's own, MIT")
    for name, public in prompts.PUBLIC_SETS.items():
        print(f"  {name:<18} {public.citation}; {public.licence}")
    for notebook in notebooks.values():
        print(f"\n{notebook.name}")
        for parameter in notebook.parameters.values():
            print(f"  {f'{parameter.name}: {parameter.kind} = {parameter.default!r}':<44} {parameter.help}")


def show_plan(graph: Graph) -> None:
    """What --dry-run prints: every job with its estimated memory and time."""
    with tempfile.TemporaryDirectory() as scratch:
        waiting = {job.key for job in replace(graph, logs=Path(scratch)).pending()}
    gpu, width = bool(graph.profile or visible_gpus()), max(len(job.title) for job in graph.jobs.values())
    print(f"Rough needs of each job on {'a GPU' if gpu else 'one CPU core'}, if nothing is stored yet:")
    for job in graph.jobs.values():
        state = "would run" if job.key in waiting else "up to date"
        print(f"{state}  {job.title:<{width}}  {estimates.need(job.notebook, job.parameters, gpu)}")
    print(f"{len(waiting)} of {len(graph.jobs)} jobs would run")


def clean(results: Path) -> None:
    """Deletes what runs made in the results folder, its lock last, and the folder if nothing else is in it. UsageError
    if a run is under way in it, or if none ever was."""
    if not results.is_dir() or not os.listdir(results):
        print(f"nothing to delete: there is nothing in {results}")
        return
    if not (results / RUN_LOCK).is_file():
        raise UsageError(f"{results} was not made by ./run_all.sh, so it is not deleted")
    kept = []
    with sole_run(results):
        for path in sorted(results.iterdir()):
            if not made_by_runs(path):
                kept.append(path.name)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != RUN_LOCK:
                path.unlink()
        (results / RUN_LOCK).unlink()
    with suppress(OSError):  # other files, a link to the folder, or the next run has begun in it
        results.rmdir()
    print(f"deleted {results}" + (f" but for {', '.join(kept)}, with files that no run made" if kept else ""))


def made_by_runs(path: Path) -> bool:
    """Whether something in a results folder is a run's, by its name or, a model's folder, by all names in it."""
    if path.is_dir() and all(re.fullmatch(MADE_OF_A_MODEL, name) for name in os.listdir(path)):
        return True
    return re.fullmatch(MADE, path.name) is not None


def take_in(source: Path, results: Path) -> None:
    """Adds the results of another machine to these. UsageError if they cannot be read, or a run is under way."""
    check_folder(results)
    with sole_run(results):
        merged = merge(source, results)
    print(f"{merged.copied} files copied from {source}, {merged.present} were here already")
    if merged.different:
        print(f"{merged.different} tables or notebooks differ from those here, which stay; run their notebooks again")


def open_lab() -> NoReturn:
    """Replaces this process by JupyterLab, whose default kernel is this environment's."""
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    as_root = ["--allow-root"] if os.geteuid() == 0 else []  # usual in containers; it listens on this machine only
    os.execv(sys.executable, [sys.executable, "-P", "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}", *as_root])


def perform(graph: Graph) -> int:
    """Runs what is not up to date; 1 if some of it could not be done. ModelError for a model that it has to load."""
    started = time.monotonic()
    with sole_run(graph.results):
        pending = graph.pending()
        if not pending:
            print(f"nothing to do: {len(graph.jobs)} jobs are up to date in {graph.results}")
            return 0
        for model in dict.fromkeys(job.parameters["model"] for job in pending if "model" in job.parameters):
            registry.check(model)
        undone = graph.run(pending)
    took = f"{time.monotonic() - started:.0f} s"
    if undone:
        print(f"{undone} of {len(pending)} jobs are not done after {took}; what went wrong stands in {graph.logs}")
        return 1
    print(f"{len(pending)} jobs done in {took}; results in {graph.results}, figures in {figures_folder()}")
    return 0


def command(arguments: Sequence[str]) -> int:
    """Checks everything, then does what was asked. Returns the exit status. UsageError or ModelError for bad input."""
    options = parse(arguments)
    whole = {"--clean": options.clean, "--import": options.source, "--list": options.list, "--lab": options.lab}
    if any(whole.values()) and (options.models or options.notebooks or options.set):
        flag = next(flag for flag, value in whole.items() if value)
        raise UsageError(f"{flag} concerns all models and notebooks: leave out --models, --notebooks and --set")
    set_folders(options)
    if options.lab:
        open_lab()
    if options.clean:
        clean(results_folder())
        return 0
    if options.source:
        take_in(options.source, results_folder())
        return 0
    notebooks = read_notebooks(Path(os.environ.get("APPROX_NOTEBOOKS") or ROOT / "notebooks").resolve())
    if options.list:
        show_choices(notebooks)
        return 0
    models = chosen_models(options)
    jobs = plan(options, chosen_notebooks(options.notebooks, notebooks), models)
    check_scale(options)
    results = results_folder()
    keyed = {job.key: job for job in jobs}
    graph = Graph(keyed, results, results / "logs", options.jobs, options.profile, rerun_all=options.rejudge)
    check_names(graph)
    if options.dry_run:
        show_plan(graph)
        return 0
    check_folder(results)
    check_folder(figures_folder())
    return perform(graph)


def main(arguments: Sequence[str]) -> int:
    """`command`, with one line on stderr where it cannot do what was asked: 2 for bad input, 130 if stopped."""
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        return command(arguments)
    except (UsageError, registry.ModelError, OSError) as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run_all.sh: stopped; what is finished is kept, and the same command takes up the rest", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
