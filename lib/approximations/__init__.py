"""The techniques by name, one file each: `make("teal", sparsity=0.5)`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lib.approximations.bolt import Bolt
from lib.approximations.bumblebee import BumbleBee
from lib.approximations.cats import Cats
from lib.approximations.iron import Iron
from lib.approximations.nexus import Nexus
from lib.approximations.noise import Gaussian, Laplace
from lib.approximations.omniquant import OmniQuant
from lib.approximations.smoothquant import SmoothQuant
from lib.approximations.teal import Teal
from lib.approximations.technique import OPERATIONS, State, Step, Technique

TECHNIQUES: dict[str, type[Technique]] = {
    technique.name: technique
    for technique in (Iron, Bolt, BumbleBee, Nexus, Teal, Cats, SmoothQuant, OmniQuant, Gaussian, Laplace)
}


def make(name: str, **settings: Any) -> Technique:
    """The technique `name` with these settings. ValueError lists the valid names or settings for a misspelt one,
    and says which settings are of a wrong type."""
    if name not in list(TECHNIQUES):
        raise ValueError(f"unknown technique {name!r}; choose one of {', '.join(TECHNIQUES)}")
    valid = [field.name for field in fields(TECHNIQUES[name])]
    unknown = [setting for setting in settings if setting not in valid]
    if unknown:
        raise ValueError(f"{name}: unknown setting {', '.join(unknown)}; valid settings are {', '.join(valid)}")
    try:
        return TECHNIQUES[name](**settings)
    except TypeError as error:
        raise ValueError(f"{name}: {settings} are not valid settings ({error})") from None


__all__ = ["OPERATIONS", "TECHNIQUES", "State", "Step", "Technique", "make"]
