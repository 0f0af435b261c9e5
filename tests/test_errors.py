"""Errors of users' code as one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from jwins.errors import UsageError, error_text


def error_of(source: str, file: Path) -> Exception:
    with pytest.raises(Exception) as caught:
        exec(compile(source, str(file), "exec"), {"torch": torch})
    return caught.value


@pytest.mark.parametrize("folder", [Path(sys.prefix), Path(sys.prefix, "src"), Path("/usr/src/app")])
def test_files_beside_an_environment_are_the_users(folder: Path) -> None:
    error = error_of("x = {}\ntorch.stack(x['a'])", folder / "task.py")
    assert error_text(error) == "KeyError: 'a' (task.py, line 2)"


def test_files_of_libraries_are_not_the_users() -> None:
    assert "__init__" not in error_text(error_of("1 / 0", Path(torch.__file__)))
    assert error_text(error_of("import json; json.loads('')", Path("task.py"))).endswith("(task.py, line 1)")


def test_a_first_line_that_announces_another_is_followed_by_it() -> None:
    error = error_of("torch.nn.Linear(2, 2).load_state_dict({})", Path("task.py"))
    assert error_text(error) == (
        "RuntimeError: Error(s) in loading state_dict for Linear: "
        'Missing key(s) in state_dict: "weight", "bias". (task.py, line 1)'
    )
    assert error_text(ValueError("\n one\ntwo")) == "ValueError: one"
    assert error_text(ValueError()) == "ValueError"
    assert error_text(UsageError("as it is")) == "as it is"
