"""Every number of every command has a smallest and a largest value."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from recipes.__main__ import main
from recipes.command_line import _COMMANDS, _DATA_COMMANDS, _FILE_COMMANDS
from recipes.options.flat import flat_options
from recipes.options.parse import train_options
from recipes.options.values import OptionError, element

KINDS = {
    **{name: kind for name, (kind, _) in _COMMANDS.items()},
    **{f"data {name}": kind for name, (kind, _) in (_DATA_COMMANDS | _FILE_COMMANDS).items()},
}
NUMBERS = [
    (command, entry)
    for command, kind in KINDS.items()
    for entry in flat_options(kind).values()
    if element(entry.hint)[0] in (int, float) or entry.name == "upper_lr"
]
EACH = pytest.mark.parametrize(
    ("command", "entry"), NUMBERS, ids=[f"{command} {entry.flag}" for command, entry in NUMBERS]
)


def test_the_walk_finds_the_numbers_of_all_commands():
    found = {f"{command} {entry.name}" for command, entry in NUMBERS}
    assert found >= {
        *("train steps", "train lower_betas", "train upper_max_norm", "train upper_lr"),
        *("cold-start draw", "score workers", "select seed", "evaluate threshold", "weigh keep"),
        *("compare seeds", "data embedded seed", "data pretrain-base scale", "data split seed"),
        *("data validate max_patches", "data inspect row", "data inspect candidate"),
    }
    assert len(NUMBERS) > 80


@EACH
def test_a_number_has_limits_and_its_default_keeps_them(command, entry):
    assert math.isfinite(entry.least)
    assert math.isfinite(entry.most)
    defaults = entry.default if isinstance(entry.default, tuple) else (entry.default,)
    for value in defaults:
        assert value in (None, "auto") or entry.least <= value <= entry.most


@EACH
def test_a_number_beyond_its_limits_ends_in_one_sentence(command, entry, capsys):
    files = ["f"] if command.removeprefix("data ") in _FILE_COMMANDS else []
    beyond = ["1" + 29 * "0", "-1" + 29 * "0", "nan", "inf", 5000 * "9"]
    for value in [*beyond, *(["-1"] if entry.least > -1 else [])]:
        values = [value] * (len(get_args(entry.hint)) if element(entry.hint)[1] else 1)
        assert main([*command.split(), *files, entry.flag, *values]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"bilevel-prm {command}: ")
        assert entry.flag in line or entry.name in line
        assert "expected" in line
        assert value[:100] in line or str(float(value)) in line
        assert len(line) < 500


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("steps", -1, "--steps: expected 0 or more, found -1"),
        ("steps", 10**7 + 1, "--steps: expected at most 10,000,000, found 10000001"),
        ("lower_betas", (0.9, 1.5), "--lower-betas: expected at most 1, found 1.5"),
        ("upper_lr", "1e30", "--upper-lr: expected at most 1,000,000, found 1e30"),
        ("lower_max_norm", math.nan, "--lower-max-norm: expected 0 or more, found nan"),
    ],
)
def test_options_from_python_keep_the_limits_too(name, value, text):
    with pytest.raises(OptionError) as error:
        train_options(train_file="t", output_dir="o", **{name: value})
    assert str(error.value) == text
