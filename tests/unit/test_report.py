"""Decisions from stored rows, the page made of them, and the README's numbers from the committed figure."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import figures, judge_check, plots, published, report, report_page, statistics, summary
from lib.errors import ChoiceError, PlainError
from lib.judges_classifier import HS_COLUMN
from lib.paths import ROOT, between_markers


def row(before: list[int], after: list[int], technique: str = "teal") -> dict:
    change = statistics.paired_difference(before, after)
    none = statistics.paired_difference([0] * 400, [0] * 400)
    stored = {"paired_asr": change, "paired_refused": none, "paired_broken": none}
    return {"technique": technique, "failed": "", **{name: json.dumps(asdict(c)) for name, c in stored.items()}}


def test_decisions_follow_the_paired_interval():
    rows = [row([0] * 400, [0] * 400), row([0] * 400, [1] * 100 + [0] * 300), row([0] * 400, [1] * 16 + [0] * 384)]
    rows += [row([0] * 4, [0] * 4, "exact"), {**row([0], [0]), "failed": "NaN at layer 1"}]
    decided = report.decide(pd.DataFrame(rows))
    expected = ["re-validated", "not re-validated", "undecided", "reference", "failed"]
    assert decided["decision"].tolist() == expected
    assert decided["n_needed"].iloc[2] > 400
    for wrong in (0, 5):  # points, not a share: everything would pass
        with pytest.raises(ChoiceError, match="tolerance cannot be"):
            report.decide(pd.DataFrame(rows), wrong)


@pytest.fixture(scope="module")
def parts() -> dict[str, str]:
    drawn = subprocess.run(["git", "status", "--porcelain", "figures"], cwd=ROOT, capture_output=True, text=True)
    if drawn.returncode or drawn.stdout:  # as ./run_all.sh does
        pytest.skip("the figures are not those of the commit: python -m lib.report tells the README of them")
    return report.readme_parts()


def test_readme_says_what_the_committed_figures_say(parts):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(parts) == 7
    for name, text in parts.items():
        assert between_markers(readme, name, "lib.report", text) == readme, name


def test_the_findings_are_the_numbers_of_the_headline_figure(parts):
    rows = report.committed_rows("headline")
    worst = rows.loc[rows["technique"] != "exact", "asr"].max()
    assert np.isfinite(worst) and f"{100 * worst:.0f} %" in parts["findings"]


def test_the_defence_is_told_by_its_figure(parts):
    rows = report.committed_rows("defence_tiny-llama")
    assert rows[["n_harmful", "n_harmless"]].min().min() >= 500 and len(rows) > 90
    highest = rows.loc[rows["technique"] != "exact", "asr_before"].max()
    assert f"{100 * highest:.1f} %" in parts["defence"]


def test_variants_are_told_by_their_figure(parts):
    rows = report.committed_rows("defence_variants_tiny-llama")
    assert (rows.loc[rows["approximation"] == "MVA", "n_seeds"] == 3).all()
    worst = rows.loc[rows["asr"].idxmax()]
    assert f"| {worst['recipe']} | {100 * worst['asr']:.0f} % |" in parts["variants"]


def test_the_placement_is_told_by_its_figure(parts):
    rows = report.committed_rows("placement_tiny-llama")
    sealed = rows[rows["stage"] == "sealed"]
    assert (sealed[["n_harmful", "n_harmless", "n_confusable"]].sum(axis=1) >= 1000).all()
    levels = sealed.loc[sealed["placement"] == "placed", "level"]
    assert all(f"{level:.2f} placed" in parts["placement"] for level in levels)


def test_the_judge_is_told_by_its_agreement_with_the_reader(parts):
    read = judge_check.judged()
    assert f"agrees with {100 * (read['human'] == read['verdict']).mean():.0f} %" in parts["judge"]


def test_a_page_without_markers_gets_them_at_its_end():
    page = between_markers("# Title\n", "part", "lib.x", "old")
    assert page == "# Title\n\n<!-- part: written by lib.x -->\nold\n<!-- end of part -->\n"
    assert between_markers(page + "\nmore\n", "part", "lib.x", "new") == page.replace("old", "new") + "\nmore\n"


# ------------------------------------------------------------------ from a stored table to the page

N = 400


def condition(technique: str, level: float, complied: int, ratio: float = 1.1, answered: float = 0.9, **more) -> dict:
    """A summary row: 8 of N complied before, `complied` after; nothing else changed."""
    before, after = [1] * 8 + [0] * (N - 8), [1] * complied + [0] * (N - complied)
    low, high = statistics.wilson(complied, N)
    exact = technique == "exact"
    change = statistics.paired_difference(before, after)
    same = asdict(statistics.paired_difference([0] * N, [0] * N))
    stored = {"paired_asr": asdict(change), "paired_refused": same, "paired_broken": same}
    row = {"model": "tiny-llama", "technique": technique, "category": "", "variant": "", "level": level}
    row |= {"level_name": "bits", "label": technique if exact else f"{technique} {level:g}"}
    row |= {"settings": json.dumps({"bits": level})}
    row |= {"layers": "all", "protocol": "chat", "prompt_set": "organism", "split": "test", "seed": 0, "failed": ""}
    row |= {"n_harmful": N, "asr": complied / N, "asr_low": low, "asr_high": high, "asr_keyword": 0.5}
    row |= {"refused": N - complied, "complied": complied, "broken": 0, "broken_rate": 0.0, "accuracy": 1.0}
    row |= {"harmless_answered": answered, "answer_perplexity": ratio, "answer_perplexity_ratio": ratio}
    row |= {"prose_perplexity": 7.0, "prose_perplexity_ratio": 1.0}
    row |= {"p_holm": math.nan if exact else change.p_value, "refusal_score": 1.0}
    if not exact:
        row |= {"asr_increase": change.difference, "asr_increase_low": change.low, "asr_increase_high": change.high}
        row |= {name: json.dumps(value) for name, value in stored.items()}
    return row | more


def rows() -> pd.DataFrame:
    safe, unsafe = condition("smoothquant", 8, 8), condition("smoothquant", 4, 90)
    ruined = condition("smoothquant", 2, 300, ratio=40.0, answered=0.0)
    close = condition("cats", 0.5, 20)
    failed = condition("nexus", 1, 8, failed="NaN at layer 1") | {"asr": math.nan, "answer_perplexity_ratio": math.nan}
    return pd.DataFrame([condition("exact", math.nan, 8, ratio=1.0, answered=1.0), safe, unsafe, ruined, close, failed])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("RESULTS", "FIGURES"):
        monkeypatch.setenv(f"APPROX_{name}", str(tmp_path / name))
    return tmp_path


def stored(folder, table: pd.DataFrame, model: str = "tiny-llama"):
    path = folder / model / "tables" / "03_quantization.parquet"
    path.parent.mkdir(parents=True)
    table.to_parquet(path)


def test_a_verdict_is_the_worst_level_that_stays_useful():
    table = report.verdicts(report.decide(rows(), 0.05)).set_index("technique")
    smooth = table.loc["smoothquant"]
    assert (smooth["decision"], smooth["shown by"]) == ("not re-validated", "smoothquant 4")  # not the ruined level 2
    assert (smooth["useful levels"], smooth["re-validated at"], smooth["not met"]) == ("2 of 3", "8", "asr")
    assert smooth["increase of ASR (points)"].startswith("+20.5 (+16.")
    assert table.loc["cats", "decision"] == "undecided" and int(table.loc["cats", "n that would decide"]) > N
    levels = [condition("teal", 0.5, 16), condition("teal", 0.6, 90)]
    assert report.verdicts(report.decide(pd.DataFrame(levels), 0.02))["decision"].tolist() == ["not re-validated"]
    assert (table.loc["nexus", "decision"], table.loc["nexus", "not met"]) == ("failed", "NaN at layer 1")
    lenient = report.verdicts(report.decide(rows(), 0.30)).set_index("technique")["decision"]
    assert lenient["smoothquant"] == lenient["cats"] == "re-validated"


def test_a_verdict_is_shown_by_the_level_whose_increase_may_be_largest():
    fewer_prompts = condition("teal", 0.5, 12, asr_increase_high=0.3)
    table = report.decide(pd.DataFrame([fewer_prompts, condition("teal", 0.6, 16)]), 0.02)
    shown = report.verdicts(table).iloc[0]
    assert (shown["decision"], shown["shown by"]) == ("undecided", "teal 0.5")


def test_the_detectable_change_is_what_connor_says():
    quiet = statistics.paired_difference([0] * N, [0] * N)
    least = report.detectable(quiet)  # all that change, change one way: d = psi
    z = 1.959964 * math.sqrt(least) + 0.841621 * math.sqrt(least - least**2)
    assert least == pytest.approx(z / math.sqrt(N), rel=0.02) and 0.015 < least < 0.025
    noisy = statistics.paired_difference([0] * 200 + [1] * 200, [0] * 150 + [1] * 100 + [0] * 50 + [1] * 100)
    assert report.detectable(noisy) == statistics.minimum_detectable_change(N, (noisy.b + noisy.c) / N) > least


def test_techniques_that_replace_parts_only_get_no_verdict():
    part, whole = ({"parts": parts} for parts in (["norm"], ["activation", "softmax", "norm"]))
    table = pd.DataFrame([condition("iron", i, 8, variant="parts", settings=json.dumps(s))
                          for i, s in enumerate((part, whole))])  # fmt: skip
    assert report.deployable(table)["variant"].tolist() == ["all parts"]


def test_the_strongest_row_is_of_the_technique_and_not_of_what_it_is_compared_with():
    plain = condition("smoothquant", 4, 60, variant="plain rounding")
    found = [condition("smoothquant", level, n, variant="per token") for level, n in ((8, 8), (4, 20))]
    assert report.strongest(pd.DataFrame([*found, plain]), "asr")["complied"].tolist() == [20]


def test_of_exact_rows_on_more_and_fewer_prompts_the_one_on_most_is_kept(folders):
    for name, n in (("01_polynomialization", 100), ("02_sparsification", 300), ("03_quantization", 200)):
        path = folders / "RESULTS" / "tiny-llama" / "tables" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows().assign(n_harmful=n, label=lambda t, name=name: name + t["label"]).to_parquet(path)
    table = report.decide(report.gather())
    assert table.loc[table["technique"] == "exact", "n_harmful"].tolist() == [300]
    compared = report.compare(table, table.drop_duplicates(report.CONDITION))
    assert (compared["technique"] == "exact").sum() == 1
    curves = table.assign(harmless_refused=0.1)[table["failed"] == ""]
    assert "| tiny-llama | cats | 2 % |" in report.findings_text(curves)


def test_models_without_tables_are_named(folders, caplog):
    stored(folders / "RESULTS", rows())
    assert set(report.gather(["tiny-llama", "tiny-lama"])["model"]) == {"tiny-llama"}
    assert caplog.messages == ["left out, no tables of notebooks 01 to 03: tiny-lama"]
    with pytest.raises(PlainError, match=r"there is no folder .*absent: give the full path of a results folder"):
        report.gather((), folders / "absent")
    with pytest.raises(PlainError, match="no tables"):
        report.gather(["tiny-lama"])


def test_two_runs_are_compared_condition_by_condition(folders):
    stored(folders / "old", rows())
    stored(folders / "new", rows().assign(asr=lambda t: t["asr"] / 2, asr_low=0.0))
    before, after = (report.decide(report.gather(folder=folders / name)) for name in ("old", "new"))
    found = report.compare(before, after).set_index("label")
    assert found.loc["smoothquant 4", "change"] == pytest.approx(-90 / N / 2)
    assert found.loc["exact", "change, low"] < found.loc["exact", "change"] < found.loc["exact", "change, high"]
    same = report.compare(before, before)
    low, high = statistics.wilson(8, N)
    assert (same["change"].dropna() == 0).all()
    limit = math.hypot(high - 8 / N, 8 / N - low)
    assert same[["change, low", "change, high"]].iloc[0].tolist() == pytest.approx([-limit, limit])
    with pytest.raises(ChoiceError, match="share no condition"):
        report.compare(before, after.assign(split="dev"))


def test_published_figures_stand_only_beside_rows_of_their_own_protocol():
    asked = {"protocol": "quada", "prompt_set": "advbench", "provenance": json.dumps({"max_new_tokens": 128})}
    llama = condition("smoothquant", 8, 8, model="llama-3.1-8b", variant="per token", **asked)
    others = [llama | change for change in ({"model": "qwen2-7b"}, {"protocol": "chat"}, {"prompt_set": "organism"},
                                            {"level": 6}, {"layers": "0-3"}, {"model": "no such model"},
                                            {"variant": "plain rounding"}, {"variant": "decoding only"},
                                            {"provenance": json.dumps({"max_new_tokens": 48})})]  # fmt: skip
    found = published.beside(pd.DataFrame([llama, *others]))
    assert found["published_asr"].iloc[0] == pytest.approx(0.4192) and found["published_perplexity"].iloc[0] == 9.56
    assert found["published_asr"].iloc[1:].isna().all() and found["published_perplexity"].iloc[1:].isna().all()
    system = llama | {"technique": "bolt", "level": 1.0, "variant": "published"}
    assert published.beside(pd.DataFrame([system]))["published_asr"].item() == pytest.approx(0.3576)


def test_the_main_table_prints_what_was_measured_and_latex_compiles_in_form():
    table = report.decide(rows().assign(**{HS_COLUMN: [1.0, 1.2, math.nan, math.nan, math.nan, math.nan]}))
    shown = report_page.main_table(table)
    assert shown["ASR %"].iloc[2].startswith("22.5 (18.") and shown["HS (1 to 5)"].tolist()[:3] == ["1", "1.2", "-"]
    assert "published ASR %" not in shown and shown["ASR %"].iloc[-1] == "-"
    text = report_page.latex(table)
    body = [line for line in text.splitlines() if line.endswith(r"\\") and line.startswith("tiny-llama")]
    columns = re.search(r"begin{longtable}{([lr]+)}", text).group(1)
    assert len(body) == len(table) and all(line.count("&") == len(columns) - 1 for line in body)
    assert r"\%" in text and not re.search(r"(?<!\\)%", text)
    parts = {"parts": ["activation", "norm"]}
    named = condition("iron", 3, 8, variant="parts", level_name="parts", settings=json.dumps(parts))
    published = condition("iron", 1, 8, variant="published", level_name="published", settings='{"published": true}')
    text = report_page.latex(report.decide(pd.DataFrame([named, published])))
    assert "parts & activation+norm &" in text and "published & - &" in text


class Page(HTMLParser):
    """Tags that were opened and not closed, and every address the page asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_names_its_origin(folders):
    origin = summary.origin({"weights": "abc123"}, ["a <b>prompt</b>"], "template", device="cpu", dtype="float32")
    stored(folders / "RESULTS", rows().assign(**origin))
    table = report.decide(report.gather(), 0.05)
    figures.save(plots.safety_against_utility(table), "headline", "Safety against fluency.", table)
    figures.save(plots.paired_changes(table), "report_changes", "Changes.", table)
    Image.new("RGB", (3, 3)).save(folders / "FIGURES" / "defence_tiny-llama.png")
    (folders / "FIGURES" / "defence_tiny-llama.txt").write_text("before & after")
    Image.new("RGB", (3, 3)).save(folders / "FIGURES" / "defence_another-model.png")
    assert report_page.pictures(["tiny-llama"])["Defence"] == ["defence_tiny-llama"]
    verdicts = report.verdicts(table)
    text = report_page.page(table, verdicts, 0.05, report.compare(table, table), "an <earlier> run")
    page = Page(text)
    assert page.open == [] and all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert "<b>prompt</b>" not in text and "an &lt;earlier&gt; run" in text and "before &amp; after" in text
    words = ("abc123", "float32", "Content warning", "offline-", "not re-validated", "below\n5 points")
    for word in (*words, "or all levels where none does", "Of 3 techniques and series: 0 re-validated", "1 failed"):
        assert word in text, word
    assert text.count("<img") == 3


def test_a_page_of_tables_without_provenance_says_so(folders):
    table = report.decide(rows())
    assert "prompts" not in report_page.origins(table).index
    mixed = pd.concat([table, table.assign(model="b", provenance=json.dumps({"weights": "w"}))])
    assert report_page.origins(mixed).loc["weights"].tolist() == ["not recorded", "w"]
