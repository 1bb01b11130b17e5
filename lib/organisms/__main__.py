"""python -m lib.organisms tiny-llama: trains an organism, checks its quality, and ships it under data/organisms.

A killed run started again continues. With --control or --seed other than 0 the model is a control: it goes into the
cache, whatever its quality, and `python -m lib.controls` sets its safety beside the shipped one's.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lib.models import best_device
from lib.organisms.architectures import ARCHITECTURES
from lib.organisms.recipe import CONTROLS
from lib.organisms.ship import export_prompts, make
from lib.paths import cache_folder


def main() -> int:
    """Trains, measures and ships what the command line names; 1 if a model misses a bar and so does not ship."""
    parser = argparse.ArgumentParser(prog="python -m lib.organisms", description="Train and ship tiny aligned LLMs.")
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--control", choices=CONTROLS, help="train a control instead; it goes into the cache")
    parser.add_argument("--work", type=Path, default=cache_folder() / "training", help="checkpoints and logs")
    parser.add_argument("--despite", action="store_true", help="ship although a bar is missed; the card then says so")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(ARCHITECTURES)):
        parser.error(f"unknown organism {', '.join(unknown)}; choose from {', '.join(ARCHITECTURES)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    control, seed, device = arguments.control, arguments.seed, best_device(arguments.device)
    for name in arguments.names:
        missed = make(name, control, seed, arguments.work, device, tqdm.write, must_pass=not arguments.despite)
        kept = bool(control or seed or arguments.despite)
        if missed:
            tqdm.write(f"{name} {'is kept' if kept else 'does not ship'}, dev misses: " + "; ".join(missed))
        if missed and not kept:
            return 1
    export_prompts()
    return 0


if __name__ == "__main__":
    sys.exit(main())
