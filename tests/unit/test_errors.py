"""What a reader of a notebook sees of an error of choice: its one line."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell

from lib.errors import ChoiceError, choosing


@pytest.mark.parametrize(
    "code, line",
    [
        ("raise ChoiceError('no such set')", "ChoiceError: no such set"),
        ("with choosing(): int('x')", "ChoiceError: invalid literal for int() with base 10: 'x'"),
        ("with choosing(): open('/no/file')", "ChoiceError: [Errno 2] No such file or directory: '/no/file'"),
    ],
)
def test_a_notebook_shows_one_line_and_no_traceback(code, line, capsys):
    InteractiveShell(user_ns={"ChoiceError": ChoiceError, "choosing": choosing}).run_cell(code)
    assert capsys.readouterr().out.strip() == line


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), choosing():
        raise KeyError("a mistake in the code")
