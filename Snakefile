"""The graph of jobs: one job is one notebook for one model; the report waits for all others.

`lib.workflow` writes the plan (which jobs, with which parameters) and calls Snakemake in the results folder. A job runs
again when its notebook, its parameters (forced by `lib.workflow`) or a file that they name changes, a report also when a
table does; what its conditions need is decided by lib, which skips what is finished.

On a cluster a job asks for as many GPUs as hold its model (APPROX_GPU_GIGABYTES: memory of one), for memory of the
machine through which the weights pass, and for one GPU and half as much memory more on every further attempt.
"""

import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

PLAN = config["plan"]
JOBS = json.loads(Path(PLAN).read_text())["jobs"]
EXECUTE = shlex.join([sys.executable, "-P", "-m", "lib.execute", PLAN])
PARENT = os.getpid()
GPU_GIGABYTES = float(os.environ.get("APPROX_GPU_GIGABYTES") or 80)
UNKNOWN_GIGABYTES = 40  # for a model whose size is not known beforehand


def gpus(wildcards, attempt):
    """As many as hold the model, and one more on every further attempt; 0 for a report, which reads tables."""
    if "models" in JOBS[wildcards.job]["parameters"]:
        return 0
    return math.ceil((JOBS[wildcards.job]["gigabytes"] or UNKNOWN_GIGABYTES) / GPU_GIGABYTES) + attempt - 1


def memory(wildcards, attempt):
    """MB of the machine's memory: weights pass through it."""
    size = JOBS[wildcards.job]["gigabytes"] or UNKNOWN_GIGABYTES
    return int((16 + 2 * size) * 1000 * (1 + attempt) / 2)


def tables(wildcards):
    """What a report reads, whichever run wrote it; nothing for other jobs."""
    return sorted(map(str, Path().glob("*/tables/[0-9]*.parquet"))) if "models" in JOBS[wildcards.job]["parameters"] else []


wildcard_constraints:
    job="|".join(map(re.escape, JOBS)),


rule notebook:
    input:
        source=lambda wildcards: JOBS[wildcards.job]["source"],
        after=lambda wildcards: [f"{key}.ipynb" for key in JOBS[wildcards.job]["after"]],
        tables=tables,
        named=lambda wildcards: JOBS[wildcards.job]["files"],
    output:
        "{job}.ipynb",
    resources:
        mem_mb=memory,
        gpu=gpus,
    log:
        "logs/{job}.log",
    shell:
        "exec {EXECUTE} {wildcards.job:q} {PARENT} > {log:q} 2>&1"
