"""The data commands on the command line: quick help, no option without effect, the formats."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

import recipes.data_files
from prm.data.formats.table import FORMATS
from prm.names import FORMAT_NAMES, FormatChoice
from recipes.__main__ import main
from recipes.data_files.options import (
    ConvertOptions,
    InspectOptions,
    SplitOptions,
    ValidateOptions,
)
from recipes.options.base import PrmOptions, ReadOptions

KINDS = {
    "validate": ValidateOptions,
    "convert": ConvertOptions,
    "inspect": InspectOptions,
    "split": SplitOptions,
}


def test_formats_are_those_that_there_are():
    assert get_args(FormatChoice) == ("auto", *FORMAT_NAMES)
    assert tuple(format.name for format in FORMATS) == FORMAT_NAMES


@pytest.mark.parametrize("kind", KINDS)
def test_help(kind, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", kind, "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: bilevel-prm data {kind}")
    for f in fields(KINDS[kind]):
        assert (f.name.replace("_", "-") in said) or f.name in ("file", "files")


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_read(kind):
    read = set()
    for path in Path(recipes.data_files.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                read |= {node.attr} if node.value.id == "options" else set()
    named = {"meta", "test"}  # by getattr, in validate.py
    shared = {f.name for kind in (PrmOptions, ReadOptions) for f in fields(kind)}
    # recipes.models.loading and recipes.bad_rows read the rest of these.
    assert {f.name for f in fields(KINDS[kind])} <= read | named | shared


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_needed(kind, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", kind])
    assert stop.value.code == 2
    assert "FILE" in capsys.readouterr().err
