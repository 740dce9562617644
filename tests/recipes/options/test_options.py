"""Options: command line over preset over default, and every mistake named."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from recipes.options.choices import NetOptions, OneStepOptions, TableOptions
from recipes.options.flat import flat_options, flatten
from recipes.options.groups import LowerLevel, UpperLevel
from recipes.options.parse import PRESETS, build_parser, changed, resolve, to_yaml, train_options
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.options.values import OptionError, launched_precision, resume_point
from weighting import EXAMPLE_FEATURES, FEATURES

REQUIRED = {"train_file": "t.jsonl", "output_dir": "out"}


def parse(*words: str, options: type = TrainOptions) -> dict:
    parser = argparse.ArgumentParser()
    build_parser(parser, options)
    return vars(parser.parse_args(words))


def test_command_line_wins_over_preset_wins_over_default(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("train_file: a.jsonl\noutput-dir: o\nsteps: 7\nlower_lr: 1e-4\nfreeze: [x]\n")
    options = resolve(TrainOptions, parse("--config", str(preset), "--steps", "9"))
    assert options.lower.steps == 9
    assert options.lower.lr == 1e-4
    assert options.lower.freeze == ("x",)
    assert options.lower.batch_size == 32


def test_help_names_one_default():
    parser = argparse.ArgumentParser()
    build_parser(parser, TrainOptions)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    lines = {action.dest: action.help for action in shown}
    assert len(lines) == len(shown)
    assert lines["train_file"] == "JSONL with step labels (required)"
    assert lines["freeze"].endswith("for example vision_tower (default: none)")
    assert lines["init_from"] == "model directory of a cold start; default: start from --model"
    assert lines["max_patches"].endswith("(default: as the model was trained, or else 6)")
    assert [name for name, line in lines.items() if line.count("default: ") > 1] == []


def test_help_has_a_section_for_each_group_and_names_each_option_once():
    parser = argparse.ArgumentParser()
    build_parser(parser, TrainOptions)
    text = parser.format_help()
    headings = re.findall(r"^(\S.*):$", text, flags=re.MULTILINE)
    assert headings == [
        *("options", "device and precision", "lower level", "low-rank adapters", "frozen parts"),
        *("the run", "trusted data and evaluation", "options with --weighting", "upper level"),
        "options with --hypergradient",
    ]
    assert "--batch-size N " in text
    assert "--lower-lr X " in text
    assert "--init-from PATH" in text
    assert "--batch_size" not in text


def test_both_spellings_and_every_kind_of_value():
    words = "--train_file t --output-dir o --lower-betas 0.8 0.9 --no-progress"
    words += " --lower-max-norm none --features loss label"
    options = resolve(TrainOptions, parse(*words.split()))
    assert options.lower.betas == (0.8, 0.9)
    assert options.run.progress is False
    assert options.lower.max_norm is None
    assert options.weighting.features == ("loss", "label")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step: 3\n", "unknown option 'step'; did you mean 'steps'?"),
        ("steps: many\n", "steps: expected int, found 'many'"),
        ("steps: 1.5\n", "steps: expected int, found 1.5"),
        ("steps: true\n", "steps: expected int, found True"),
        (
            "weighting: nett\n",
            "expected one of net, table, domain, labels, none; found 'nett'; did you mean",
        ),
        ("progress: maybe\n", "progress: expected true or false, found 'maybe'"),
        ("lower_betas: [0.9]\n", "lower_betas: expected 2 values, found 1"),
        ("freeze: tower\n", "freeze: expected a list, found 'tower'"),
        ("- a\n- b\n", "expected `option: value` lines, found list"),
        ("a: [\n", "not valid YAML"),
        ("", "missing --train-file, --output-dir"),
    ],
)
def test_mistakes_in_a_preset_are_named(tmp_path, content, message):
    preset = tmp_path / "p.yaml"
    preset.write_text(content)
    with pytest.raises(OptionError) as error:
        resolve(TrainOptions, {"config": str(preset)})
    assert message in str(error.value)


def test_unknown_preset_names_the_nearest_shipped_one():
    with pytest.raises(OptionError, match="did you mean 'train-net'"):
        resolve(TrainOptions, {"config": "train-nett"})


def test_yaml_of_a_run_reads_back_to_the_same_options(tmp_path):
    options = train_options(**REQUIRED, freeze=("a", "b"), lower_max_norm=None, seed=3)
    (tmp_path / "args.yaml").write_text(to_yaml(options))
    assert resolve(TrainOptions, {"config": str(tmp_path / "args.yaml")}) == options


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_preset_resolves(preset):
    kind = ColdStartOptions if preset.stem.endswith("cold-start") else TrainOptions
    resolve(kind, {"config": preset.stem})


@pytest.mark.parametrize("options", [TrainOptions, ColdStartOptions])
def test_every_option_has_help(options):
    assert all(entry.help for entry in flat_options(options).values())


def test_help_names_every_feature():
    text = flat_options(TrainOptions)["features"].help
    assert set(re.findall(r"\w+", text)) >= {*FEATURES, *EXAMPLE_FEATURES}


def test_options_are_nested_for_the_code_and_flat_for_users():
    options = train_options(**REQUIRED, weighting="table", lower_lr=0.5, upper_start=3)
    assert (options.lower.lr, options.upper.start) == (0.5, 3)
    assert options.weighting == TableOptions()
    assert options.hypergradient == OneStepOptions()
    assert options == TrainOptions(
        **REQUIRED,
        lower=LowerLevel(lr=0.5),
        weighting=TableOptions(),
        upper=UpperLevel(start=3),
    )
    flat = flatten(options)
    assert (flat["weighting"], flat["lower_lr"], flat["hidden"]) == ("table", 0.5, 10)
    assert list(flat) == list(flat_options(TrainOptions))
    assert changed(options, weighting="net", hidden=3).weighting == NetOptions(hidden=3)


def test_options_that_there_are_not_and_required_ones_are_named():
    with pytest.raises(TypeError, match="TrainOptions has no option lr"):
        train_options(**REQUIRED, lr=0.5)
    with pytest.raises(TypeError, match="TrainOptions needs output_dir"):
        train_options(train_file="t")
    with pytest.raises(OptionError, match="--hidden 3 has no effect with --weighting table"):
        train_options(**REQUIRED, weighting="table", hidden=3)


def test_a_checkpoint_of_thousands_of_digits_is_none():
    named = Path("runs/x/checkpoints/step-40")
    assert resume_point(str(named)) == (Path("runs/x"), 40)
    long = named.with_name("step-" + "9" * 5000)
    assert resume_point(str(long)) == (long, None)


@pytest.mark.parametrize("launched", [None, "no", "bf16"])
@pytest.mark.parametrize("asked", ["auto", "bf16", "float32", "bf16-pure"])
def test_the_precision_of_accelerate_is_that_of_the_option(monkeypatch, asked, launched):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if launched != "bf16":  # "no" is what it sets where nobody asked
        assert launched_precision(asked) == asked
    elif asked in ("auto", "bf16"):
        assert launched_precision(asked) == "bf16"
    else:
        both = f"--precision {asked} and ACCELERATE_MIXED_PRECISION=bf16"
        with pytest.raises(OptionError, match=both):
            launched_precision(asked)


@pytest.mark.parametrize("launched", ["fp16", "fp8", "float32", ""])
@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_other_mixed_precisions_are_refused_by_name(monkeypatch, asked, launched):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(OptionError, match=f"ACCELERATE_MIXED_PRECISION={launched}: expected no"):
        launched_precision(asked)
