"""What a reader of a notebook sees of an error of choice: its one line."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell

from lib.errors import ChoiceError, check, choosing


@pytest.mark.parametrize(
    "code, line",
    [
        ("raise ChoiceError('no such set')", "ChoiceError: no such set"),
        ("with choosing(): int('x')", "ChoiceError: invalid literal for int() with base 10: 'x'"),
        ("with choosing(): open('/no/file')", "ChoiceError: there is no file /no/file"),
        ("with choosing(): open('/')", "ChoiceError: / is a folder, not a file"),
    ],
)
def test_a_notebook_shows_one_line_and_no_traceback(code, line, capsys):
    InteractiveShell(user_ns={"ChoiceError": ChoiceError, "choosing": choosing}).run_cell(code)
    assert capsys.readouterr().out.strip() == line


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), choosing():
        raise KeyError("a mistake in the code")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"n_prompts": 0}, "n_prompts cannot be 0; give a whole number from 1"),
        ({"n_prompts": "ten"}, "n_prompts cannot be 'ten'; give a whole number from 1"),
        ({"seed": -1}, "seed cannot be -1; give a whole number from 0"),
        ({"bits": 0}, "bits cannot be 0; give a whole number from 2"),
        ({"useless": 0.5}, "useless cannot be 0.5; give a number above 1"),
        ({"doses": [1.0, -1.0]}, "doses cannot be -1.0; give a number above 0"),
        ({"damage": "much"}, "damage cannot be 'much'; give a number above 1"),
        ({"levels": []}, "levels is empty; give at least one"),
        ({"levels": [0.5, 0.25, 0.5]}, "levels has 0.5 twice; give each once"),
        ({"layers": [0, 0]}, "layers has 0 twice; give each once"),
        ({"tolerance": 5}, "tolerance cannot be 5; give a share between 0 and 1: 0.05 for 5 points"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(parameters, message):
    with pytest.raises(ChoiceError) as caught:
        check(**parameters)
    assert str(caught.value) == message


def test_parameters_that_can_be_pass():
    check(n_prompts=1, seed=0, doses=[1.0, 2], layers=[], families=[], levels=[4, 3], tolerance=0.05, model="x")
