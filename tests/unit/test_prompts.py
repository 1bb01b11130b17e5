"""lib.prompts: schema and user files, sampling, splits, replayed jailbreaks, protocols, the reference sets."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lib import prompts
from lib.download import PUBLIC_SETS
from lib.prompts import Attack, Prompt, load, load_attacks, parse, render, turn_end


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def lines(*rows: Mapping[str, object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ------------------------------------------------------------------ user files


def test_jsonl_only_prompt_is_required(tmp_path: Path) -> None:
    rows = {"prompt": "Bake brød"}, {"prompt": "Sew", "id": 7, "label": "harmless", "category": "", "target": "Sure"}
    loaded = load(write(tmp_path, "mine.jsonl", lines(*rows)))
    assert len(loaded) == 2
    assert loaded[0] == Prompt("mine-00000", "Bake brød", split="test")
    assert loaded[1] == Prompt("7", "Sew", label="harmless", split="search")


def test_csv_equals_jsonl(tmp_path: Path) -> None:
    table = '\ufeffid,prompt,label\r\na,"Two\r\nlines, ""quoted""",harmful\r\nb,Plain,\r\n'
    rows = {"id": "a", "prompt": 'Two\r\nlines, "quoted"', "label": "harmful"}, {"id": "b", "prompt": "Plain"}
    from_csv, from_jsonl = load(write(tmp_path, "s.csv", table)), load(write(tmp_path, "s.jsonl", lines(*rows)))
    assert from_csv == from_jsonl and len(from_csv) == 2


GOOD = b'{"prompt": "one"}\n\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "s.jsonl has no prompts"),
        (b"\n \n", "s.jsonl has no prompts"),
        (GOOD + b'{"prompt": "tw', r"s.jsonl, line 3: not JSON \(Unterminated string .* at column 12\)"),
        (GOOD + b'["two"]', "line 3: not a JSON object but list"),
        (GOOD + b'{"promt": "two"}', "line 3: no text under 'prompt'"),
        (GOOD + b'{"prompt": " \\n"}', "line 3: no text under 'prompt'"),
        (GOOD + b'{"prompt": 2}', "line 3: prompt must be text, not int"),
        (GOOD + b'{"prompt": "two", "category": ["x"]}', "line 3: category must be text, not list"),
        (GOOD + b'{"prompt": "two", "label": "bad"}', "line 3: unknown label 'bad'; valid: harmful, harmless, confus"),
        (
            GOOD + b'{"prompt": "two", "split": "eval"}',
            "line 3: unknown split 'eval'; valid: train, search, dev, val, t",
        ),
        (GOOD + b'{"prompt": "two", "id": "s-00000"}', "line 3: id 's-00000' occurs a second time"),
        (GOOD + b'{"prompt": "caf\xe9"}', r"line 3: not UTF-8 \(byte 0xe9\)"),
        (GOOD + b'{"prompt": "\\ud800"}', "line 3: prompt holds half a surrogate pair"),
        (GOOD + b'{"prompt": "' + b"a" * 2**20 + b'"}', "line 3: prompt has 1,048,576 characters, more than 100,000"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(write(tmp_path, "s.jsonl", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "s.csv, line 1: no column 'prompt'; columns: none"),
        ("text,label\nx,\n", "s.csv, line 1: no column 'prompt'; columns: text, label"),
        ("prompt,label\n", "s.csv has no prompts"),
        ("prompt, label\na,harmless\n", "s.csv: unknown column ' label'; write 'label'"),
        ("prompt,Label,note\na,harmless,x\n", "s.csv: unknown column 'Label'; write 'label'"),
        ("prompt,label\na,harmful\nb\n", "line 3: not 2 cells as in the header"),
        ("prompt,label\na,harmful,x\n", "line 2: not 2 cells as in the header"),
        ('prompt,label\n"two\nlines",\n\nc,odd\n', "line 5: unknown label 'odd'"),
        ('prompt,label\n"open,\n', "line 2: not CSV"),
        (f"prompt\na\n{'b' * 110_000}\n", "line 3: prompt has 110,000 characters, more than 100,000"),
        (f"prompt\na\n{'b' * 2**20}\n", r"line 3: not CSV \(field larger .* prompts have at most 100,000 characters"),
        (b"prompt\na\ncaf\xe9\n", r"line 3: not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_bad_csv_names_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(write(tmp_path, "s.csv", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_unknown_names_list_the_valid_ones(tmp_path: Path) -> None:
    valid = (
        "advbench, harmbench, jailbreakbench, strongreject, maliciousinstruct, tdc2023, beavertails, xstest, alpaca, "
    )
    with pytest.raises(ValueError, match=f"unknown prompt set 'advbensh'; valid: {valid}organism, freeform, or a path"):
        load("advbensh")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.jsonl")


def test_filters_say_what_is_there(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "split": "dev" if i % 2 else "test", "tier": "A"} for i in range(4)]
    path = write(tmp_path, "s.jsonl", lines(*rows))
    assert [p.prompt for p in load(path, split="search", tier="A")] == ["p1", "p3"]
    with pytest.raises(ValueError, match="s has no prompts with split 'train'; present: search, test"):
        load(path, split="train")
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        load(path, n=0)


def test_own_sets_are_read_from_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "OWN_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="no files of the prompt set 'organism'"):
        load("organism")
    row = {"goal": "tea", "label": "confusable", "tier": "objects", "answer": "Boil it.", "refusal": "No."}
    for split in ("dev", "test"):
        write(
            tmp_path, f"organism_{split}.jsonl", lines(row | {"id": split, "prompt": f"Tea? {split}", "split": split})
        )
    write(tmp_path, "organism_freeform.jsonl", lines({"id": "f", "prompt": "Free"}))
    organism = load("organism")
    assert [p.id for p in organism] == ["dev", "test"] and organism[0].answer == "Boil it."
    assert [p.id for p in load("freeform")] == ["f"]
    assert load("organism", split="test", label="confusable", tier="objects") == organism[1:]
    write(tmp_path, "organism_search.jsonl", lines({"id": "dev", "prompt": "Again"}))
    with pytest.raises(ValueError, match="id 'dev' occurs a second time"):
        load("organism")


# ------------------------------------------------------------------ sampling, splits


@pytest.fixture
def categorised(tmp_path: Path) -> Path:
    letters = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    random.Random(1).shuffle(letters)
    return write(tmp_path, "s.jsonl", lines(*({"prompt": f"{i}", "category": c} for i, c in enumerate(letters))))


def test_sampling_is_stratified_nested_and_seeded(categorised: Path) -> None:
    drawn = load(categorised, n=20, seed=3)
    counts = Counter(p.category for p in drawn)
    assert all(abs(counts[c] - share) <= 1 for c, share in {"a": 12, "b": 6, "c": 2}.items()) and len(drawn) == 20
    assert drawn == load(categorised, n=20, seed=3) != load(categorised, n=20, seed=4)
    positions = [int(p.prompt) for p in drawn]
    assert positions == sorted(positions)
    assert {p.id for p in load(categorised, n=9, seed=3)} < {p.id for p in drawn}
    assert load(categorised, n=1000) == load(categorised)


def test_every_prompt_can_be_drawn(categorised: Path) -> None:
    times = Counter(p.id for seed in range(200) for p in load(categorised, n=20, seed=seed))
    assert len(times) == 100 and max(times.values()) < 80  # 40 expected


def test_goals_are_drawn_by_the_seed() -> None:
    drawn = [prompts.goals_first("test", "harmful", 20, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_request_is_in_one_split_whatever_its_file_is_called(tmp_path: Path) -> None:
    rows = [{"prompt": f"request {i}"} for i in range(400)]
    first, second = (load(write(tmp_path, name, lines(*rows))) for name in ("a.jsonl", "b.jsonl"))
    assert [p.split for p in first] == [p.split for p in second]
    counts = Counter(p.split for p in first)
    assert set(counts) == {"search", "test"} and 70 <= counts["search"] <= 130
    told = [{"prompt": f"p{i}", "split": split} for i, split in enumerate(("val", "dev", "search", "train", "test"))]
    assert [p.split for p in load(write(tmp_path, "c.jsonl", lines(*told)))] == [*["search"] * 3, "train", "test"]
    goals = [{"prompt": f"wording {i}", "goal": f"goal {i % 40}"} for i in range(400)]
    of_goal = {(p.goal, p.split) for p in load(write(tmp_path, "d.jsonl", lines(*goals)))}
    assert len(of_goal) == 40  # rewordings of a goal stay together


# ------------------------------------------------------------------ replayed jailbreaks


def test_attacks_are_suffixes_and_templates(tmp_path: Path) -> None:
    file = write(
        tmp_path, "x.jsonl", lines({"suffix": "please !!"}, {"id": "dan", "template": "Hi {prompt}! {prompt}?"})
    )
    suffix, template = load_attacks(file)
    assert (suffix, template) == (Attack("x-1", "{prompt} please !!"), Attack("dan", "Hi {prompt}! {prompt}?"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"suffix": 3}', "x.jsonl, line 2: needs a text under either 'suffix' or 'template'"),
        ('{"suffix": "a", "template": "{prompt}"}', "line 2: needs a text under either"),
        ('{"template": "no place"}', "line 2: a template needs {prompt}"),
        ('{"suffix": "a {prompt}"}', "line 2: a template needs {prompt}, a suffix must not"),
        ('{"suffix": ""}', "line 2: no text under 'suffix'"),
        ('{"suffix": "b", "id": "x-1"}', "line 2: id 'x-1' occurs a second time"),
        ("{", "line 2: not JSON"),
    ],
)
def test_bad_attacks_name_the_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_attacks(write(tmp_path, "x.jsonl", '{"suffix": "a"}\n' + row))


def test_no_attacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.jsonl has no attacks"):
        load_attacks(write(tmp_path, "x.jsonl", "\n"))


# ------------------------------------------------------------------ protocols

ROLE = "{{ '[' + m['role'] + ']' + m['content'] + '[end]' }}"
REPLY = "{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN_TEMPLATE = "{{ bos_token }}{% for m in messages %}" + ROLE + "{% endfor %}" + REPLY
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + PLAIN_TEMPLATE
)
DROPS_SYSTEM = "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}" + ROLE + "{% endfor %}" + REPLY
LLAMA2_TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] <<SYS>>{{ m['content'] }} [/INST]{% endfor %}"


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that adds its begin token by itself, as Llama's does."""
    words = ["<unk>", "<s>", "User", "Sew"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    made.chat_template = template
    return made


SYSTEM = prompts.QUADA_SYSTEM


@pytest.mark.parametrize(
    ("template", "protocol", "text"),
    [
        (PLAIN_TEMPLATE, "chat", "<s>[user]Sew[end][assistant]"),
        (PLAIN_TEMPLATE, "quada", f"<s>[system]{SYSTEM}[end][user]Instruction: Sew[end][assistant]"),
        (REFUSES_SYSTEM, "quada", f"<s>[user]{SYSTEM}\nInstruction: Sew[end][assistant]"),
        (DROPS_SYSTEM, "quada", f"<s>[user]{SYSTEM}\nInstruction: Sew[end][assistant]"),
        (LLAMA2_TEMPLATE, "quada", f"{SYSTEM}\nInstruction: Sew\nResponse:"),
        (LLAMA2_TEMPLATE, "chat", "<s>[INST] <<SYS>>Sew [/INST]"),
        (None, "quada", f"{SYSTEM}\nInstruction: Sew\nResponse:"),
        (None, "chat", "User: Sew\nAssistant:"),
    ],
)
def test_protocol_texts_with_one_begin_token(
    template: str | None, protocol: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = tokenizer(template)
    texts, special = render(made, ["Sew", Prompt("id", "Sew")], protocol)
    assert texts == [text, text] and special == (not text.startswith("<s>"))
    assert ("no chat template" in caplog.text) == (template is None)
    tokens = made(text, add_special_tokens=special)["input_ids"]
    if template == PLAIN_TEMPLATE:
        conversation = prompts.messages("Sew", protocol)
        assert tokens == made.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert tokens.count(made.bos_token_id) == 1


def test_quada_text_is_the_released_one() -> None:
    wording = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert prompts.messages("Sew", "quada") == [
        {"role": "system", "content": wording},
        {"role": "user", "content": "Instruction: Sew"},
    ]
    listed = " ".join(prompts.QUADA_DEVIATIONS)
    assert all(word in listed for word in ("do_sample", "attention mask", "[PAD]"))


@pytest.mark.parametrize("day", ["{{ strftime_now('%d %b %Y') }}", "{{ date_string }}"])
def test_a_template_that_prints_the_date_gives_the_same_prompt_every_day(day: str) -> None:
    assert render(tokenizer(day + PLAIN_TEMPLATE), ["Sew"])[0] == ["26 Jul 2024<s>[user]Sew[end][assistant]"]


def test_reasoning_is_off_where_a_template_has_the_option() -> None:
    thinking = "{{ '' if enable_thinking is defined and not enable_thinking else '[think]' }}"
    assert render(tokenizer(PLAIN_TEMPLATE + thinking), ["Sew"])[0] == ["<s>[user]Sew[end][assistant]"]


def test_the_end_of_a_turn_is_the_templates_and_else_the_tokenizers() -> None:
    """Gemma and Phi-3 end a turn by another token than the tokenizer's end token, and may list both."""
    made = tokenizer("{% for m in messages %}{{ m['content'] }} Sew User {% endfor %}")
    made.eos_token = "<unk>"
    sew, user, unknown = (made.convert_tokens_to_ids(word) for word in ("Sew", "User", "<unk>"))
    assert turn_end(made, [user, unknown]) == [user] and turn_end(made, [user, sew]) == [sew]
    assert turn_end(made, [99]) == [unknown]
    made.chat_template = None
    assert turn_end(made, [user]) == [unknown]
    made.eos_token = None
    assert turn_end(made, [user]) == []


def test_protocol_errors() -> None:
    made = tokenizer(PLAIN_TEMPLATE)
    with pytest.raises(ValueError, match="unknown protocol 'raw'; valid: chat, quada"):
        render(made, ["Sew"], "raw")
    with pytest.raises(ValueError, match=r"one text is no list of prompts: write \['Sew'\]"):
        render(made, "Sew")
    with pytest.raises(ValueError, match="no prompts to render"):
        render(made, [])


# ------------------------------------------------------------------ the reference sets

SIZES = {
    "advbench": 520, "harmbench": 200, "jailbreakbench": 100, "strongreject": 313, "maliciousinstruct": 100,
    "tdc2023": 100, "beavertails": 8210, "xstest": 450, "alpaca": 5000,
}  # fmt: skip
needs_data = pytest.mark.skipif(not os.environ.get("APPROX_DATA_MIRROR"), reason="APPROX_DATA_MIRROR is not set")


@needs_data
@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_reference_sets(name: str) -> None:
    assert len(load(name)) == SIZES[name]


@needs_data
def test_reference_labels_and_splits() -> None:
    assert (len(load("xstest", label="safe")), len(load("xstest", label="unsafe"))) == (250, 200)
    assert [len(load("alpaca", split=split)) for split in ("train", "search", "test")] == [3004, 1027, 969]
    assert [len(load("harmbench", split=split)) for split in ("search", "test")] == [41, 159]
    assert [len(load("advbench", split=split)) for split in ("search", "test")] == [147, 373]  # as README's plan has it


@needs_data
def test_wikitext2_text() -> None:
    text = prompts.wikitext2()
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n") and len(text.encode()) == 1_296_370
    digest = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_parse_is_reusable() -> None:
    assert [p.id for p in parse(b'{"prompt": "a"}', "folder/mine.jsonl")] == ["mine-00000"]
