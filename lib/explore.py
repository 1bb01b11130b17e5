"""One request, live: what a technique does to its verdict, its refusal score and its place among the hidden states.

`Explorer.look` computes, `Panel` wraps it in widgets. The reply itself is part of the result but shown only when asked.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lib import hidden_states, refusal_score, state_plots
from lib.approximations import Technique, make
from lib.conditions import Layers, describe
from lib.errors import ChoiceError, PlainError
from lib.experiment import Study, open_study
from lib.figures import Figure
from lib.generation import generate
from lib.prompts import Prompt
from lib.registry import smoothing_alpha

DOSES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "teal": ("sparsity", (0.25, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8)),
    "cats": ("sparsity", (0.25, 0.5, 0.7, 0.9)),
    "smoothquant": ("bits", (8, 6, 5, 4, 3, 2)),
    "omniquant": ("bits", (8, 6, 5, 4, 3, 2)),
    "bolt": ("fraction_bits", (12, 8, 6, 5, 4, 3)),
    "iron": ("fraction_bits", (12, 10, 8, 6)),
    "bumblebee": ("fraction_bits", (18, 12, 10, 8)),
    "nexus": ("range_margin", (4.0,)),
    "gaussian": ("std", (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)),
    "laplace": ("scale", (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)),
}
"""The setting that the panel varies, and its choices."""
LOOK = "look"  # on the button
LABELS = {"description_width": "95px"}  # the default cuts "fraction bits" off


@dataclass(frozen=True)
class Look:
    """What one request gives, exact and approximated. errors: share of the harmful-harmless gap, by layer."""

    table: pd.DataFrame
    before: NDArray[Any]
    after: NDArray[Any]
    errors: NDArray[Any]
    reply: str


class Explorer:
    """A model with the clouds of its exact hidden states; requests of the search split, so that test stays sealed."""

    def __init__(self, study: Study, n: int = 60) -> None:
        """Captures the states of n harmful and n / 2 harmless requests and finds the tokens that begin refusals.

        ChoiceError for an n below 4: one request of a kind has no spread."""
        if n < 4:
            raise ChoiceError(f"{n} harmful requests are too few for a cloud; give 4 at least")
        self.n, self.study = n, study.brief(n, "search")
        self.tokens = refusal_score.refusal_tokens(study.tokenizer, self.study.replies())
        self.labels = [str(prompt.label) for prompt in self.study.prompts]
        self.requests = [prompt.prompt for prompt in self.study.prompts]
        states = hidden_states.capture(self.study, self.study.prompts)
        self.directions = {i: hidden_states.refusal_direction(x, self.labels) for i, x in states.items()}
        self.layer = hidden_states.best_layer(states, self.directions, self.labels)
        self.axes = hidden_states.principal_axes(states[self.layer])
        self.cloud = self.axes.transform(states[self.layer])

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return len(self.directions)

    def look(self, request: str, technique: Technique, layers: Layers = None) -> Look:
        """Verdicts, refusal scores, places and errors of one request. ValueError for an empty one."""
        if not request.strip():
            raise ValueError("the request is empty: type one, or pick one from the list")
        exact, _ = self._answer(request, None, None)
        rough, reply = self._answer(request, technique, layers)
        prompt = [Prompt(id="live", prompt=request)]
        before = hidden_states.capture(self.study, prompt)
        after = hidden_states.capture(self.study, prompt, technique, layers)
        for row, states in ((exact, before), (rough, after)):
            row[f"place on the refusal direction, layer {self.layer}"] = float(
                self.directions[self.layer].place(states[self.layer])[0]
            )
        gaps = [direction.gap for direction in self.directions.values()]
        errors = np.array([np.linalg.norm(after[i] - before[i]) for i in before]) / gaps
        first, second = (self.axes.transform(states[self.layer])[0] for states in (before, after))
        table = pd.DataFrame({"exact": exact, describe(technique): rough})
        return Look(table, first, second, errors, reply)

    def _answer(self, request: str, technique: Technique | None, layers: Layers) -> tuple[dict[str, Any], str]:
        """({verdict, refusal score}, reply) of one request."""
        study = self.study
        with study.patched(technique, layers):
            reply = generate(study.model, study.tokenizer, [request], study.max_new_tokens, study.protocol)[0]
            score = float("nan")
            if self.tokens:
                asked = (study.model, study.tokenizer, [request], self.tokens, study.protocol)
                score = refusal_score.refusal_scores(*asked).item()
        return {"verdict": study.judge([request], [reply])["verdict"].item(), "refusal score": score}, reply

    def figure(self, look: Look) -> Figure:
        """The request before and after among the clouds, and its error by layer."""
        return state_plots.one_prompt(self.cloud, self.labels, look.before, look.after, look.errors, self.layer)


class Panel:
    """Widgets around an Explorer: choose, look, and only then ask for the reply."""

    def __init__(self, explorer: Explorer, models: Sequence[str] = (), **options: Any) -> None:
        """models: what the reader may switch to; options: further arguments of `open_study` for that."""
        self.explorer, self.options, self.seen = explorer, options, ""
        names = list(dict.fromkeys([explorer.study.name, *models]))
        self.model = widgets.Dropdown(options=names, description="model", style=LABELS)
        self.technique = widgets.Dropdown(options=list(DOSES), value="teal", description="technique", style=LABELS)
        self.dose = widgets.SelectionSlider(options=[0], continuous_update=False, style=LABELS)
        self.layers = widgets.IntRangeSlider(description="layers", style=LABELS)
        self.request = widgets.Combobox(placeholder="type or pick a request", description="request",
                                        style=LABELS, layout={"width": "90%"})  # fmt: skip
        self.go = widgets.Button(description=LOOK, button_style="primary")
        self.ask = widgets.ToggleButton(description="show the reply", disabled=True)
        self.result, self.reply = widgets.HTML(), widgets.HTML()
        self.image = widgets.Image(format="png", layout={"max_width": "770px"})  # as drawn; a box would stretch it
        self._picture(b"")
        self.model.observe(self._switch, "value")
        self.technique.observe(self._choose, "value")
        self.go.on_click(self._look)
        self.ask.observe(self._show, "value")
        self._choose()
        self._follow_model()
        rows = [[self.model, self.technique], [self.dose, self.layers], [self.request], [self.go, self.ask]]
        boxes = [widgets.HBox(row) for row in rows]
        self.widget = widgets.VBox([*boxes, self.result, self.image, self.reply])

    def _choose(self, *_: Any) -> None:
        setting, levels = DOSES[self.technique.value]
        self.dose.options = [(f"{level:g}", level) for level in levels]
        self.dose.description = setting.replace("_", " ")
        self.dose.value = levels[len(levels) // 2]

    def _follow_model(self) -> None:
        self.layers.max = self.explorer.n_layers - 1
        self.layers.value = (0, self.explorer.n_layers - 1)
        self.request.options = self.explorer.requests

    def _switch(self, *_: Any) -> None:
        self._clear(f"loading {self.model.value} ...")
        try:
            self.explorer = Explorer(open_study(self.model.value, **self.options), self.explorer.n)
        except PlainError as error:
            self._clear(f"{error}; still at {self.explorer.study.name}")
            return
        self._follow_model()
        self._clear("")

    def chosen(self) -> Technique:
        """The technique as the widgets say; TEAL on the whole prompt, so that one request shows its effect, and
        SmoothQuant with the model's own alpha."""
        name = self.technique.value
        settings: dict[str, Any] = {DOSES[name][0]: self.dose.value}
        if name == "teal":
            settings["prompt"] = "all"
        elif name == "smoothquant":
            settings["alpha"] = smoothing_alpha(self.explorer.study.name)
        return make(name, **settings)

    def _look(self, *_: Any) -> None:
        self._clear("")
        low, high = self.layers.value
        self.go.description, self.go.disabled = "looking ...", True
        try:
            look = self.explorer.look(self.request.value, self.chosen(), range(low, high + 1))
        except (ValueError, ArithmeticError) as error:  # a wrong choice, or numbers that are not finite
            self._clear(str(error))
            return
        finally:
            self.go.description, self.go.disabled = LOOK, False
        table = look.table.to_html(float_format="{:.2f}".format, border=0)
        self.result.value = f'<div class="jp-RenderedHTMLCommon" style="width:fit-content">{table}</div>'
        self._picture(state_plots.png(self.explorer.figure(look)))
        self.seen, self.ask.disabled = look.reply, False

    def _clear(self, message: str) -> None:
        """Takes away what the last look left, and says why."""
        self.ask.value, self.ask.disabled = False, True
        self.result.value = html.escape(message)
        self._picture(b"")

    def _picture(self, image: bytes) -> None:
        """Shows a picture; an empty one is hidden, since browsers draw a torn page for it."""
        self.image.value, self.image.layout.display = image, None if image else "none"

    def _show(self, *_: Any) -> None:
        self.reply.value = f"<blockquote>{html.escape(self.seen)}</blockquote>" if self.ask.value else ""
