"""An option that would do nothing is refused if it was given, and never at its default."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args, get_origin

import pytest

from recipes.options.choices import NetOptions
from recipes.options.flat import flat_options, flatten
from recipes.options.parse import PRESETS, cold_start_options, resolve, train_options
from recipes.options.rules import check_together, unread
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.options.values import OptionError, element
from recipes.train.training import run_training
from tests.recipes.options.recorded import not_read, read_only_what_is_used, recorded

ENTRIES = flat_options(TrainOptions)

PLAIN = {"train_file": "t", "output_dir": "o", "weighting": "none", "test_file": "c"}
NET = {"train_file": "t", "output_dir": "o", "meta_file": "m"}
TABLE = NET | {"weighting": "table", "bound": "clip"}
DOMAIN = NET | {"weighting": "domain", "bound": "softplus"}


def refusal(given, make=train_options) -> str:
    with pytest.raises(OptionError) as error:
        check_together(make(**given))
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            PLAIN | {"upper_lr": "0.06", "order": "lower-first", "rollback": True},
            "--upper-lr 0.06, --order lower-first, --rollback have no effect with "
            "--weighting none: leave them out, or use --weighting net, table, domain or labels",
        ),
        (
            PLAIN | {"meta_file": "m", "meta_batch_size": 8},
            "--meta-batch-size 8 has no effect with --weighting none: leave it out, or use "
            "--weighting net, table, domain or labels; --meta-file m has no effect with "
            "--weighting none --lower-data train: leave it out, or use a weighting or "
            "--lower-data meta",
        ),
        (
            NET | {"bound_low": 0.5},
            "--bound-low 0.5 has no effect with --bound sigmoid: leave it out, or use "
            "--bound clip or clamp",
        ),
        (
            TABLE | {"bound": "softplus", "bound_high": 3.0},
            "--bound-high 3.0 has no effect with --bound softplus: leave it out, or use "
            "--bound clip, clamp or sigmoid",
        ),
        (
            DOMAIN | {"prior": 0.5, "normalise": "none"},
            "--prior 0.5 has no effect with --weighting domain: leave it out, or use "
            "--weighting net or table; --normalise none has no effect with --weighting domain "
            "--weights-file none: leave it out, or use --weighting net or table, or --weights-file",
        ),
        (
            TABLE | {"features": ("loss", "label"), "reference_features": False, "hidden": 3},
            "--features loss label, --no-reference-features, --hidden 3 have no effect with "
            "--weighting table: leave them out, or use --weighting net",
        ),
        (
            NET | {"features": ("label",), "reference_features": False},
            "--no-reference-features has no effect with --features label: leave it out, or use a "
            "feature that depends on the model",
        ),
        (
            NET | {"upper_optimizer": "sgd", "upper_betas": (0.5, 0.9), "upper_weight_decay": 0.1},
            "--upper-betas 0.5 0.9, --upper-weight-decay 0.1 have no effect with "
            "--upper-optimizer sgd: leave them out, or use --upper-optimizer adam or lazy-adam",
        ),
        (
            NET | {"weights_file": "w", "lower_data": "meta"},
            "--weights-file w, --lower-data meta have no effect with --weighting net: leave them "
            "out, or use --weighting none",
        ),
        (
            PLAIN | {"weights_file": "w", "lower_data": "meta", "meta_file": "m"},
            "--weights-file w has no effect with --lower-data meta: leave it out, or use "
            "--lower-data train",
        ),
        (
            PLAIN | {"test_file": None, "aggregation": "min", "eval_batch_size": 8},
            "--aggregation min has no effect with --weighting none --dev-file none --test-file "
            "none: leave it out, or give candidates to score; --eval-batch-size 8 has no effect "
            "with --weighting none --dev-file none --test-file none: leave it out, or give "
            "candidates to score",
        ),
        (
            NET | {"model": "x", "init_from": "y"},
            "--model x has no effect with --init-from y: leave it out, or use --init-from none",
        ),
        (
            NET | {"lower_schedule": "constant", "lower_warmup": 0.1},
            "--lower-warmup 0.1 has no effect with --lower-schedule constant: leave it out, or use "
            "--lower-schedule cosine",
        ),
        (
            NET | {"keep_checkpoints": 5},
            "--keep-checkpoints 5 has no effect with --save-every 0: leave it out, or use "
            "--save-every 1 or more",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused_with_reason_and_remedy(given, message):
    assert refusal(given) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            NET | {"resume": "p"},
            "--resume p --output-dir o: a resumed run stays in its directory: leave out "
            "--output-dir",
        ),
        (NET | {"meta_file": None}, "--weighting net --lower-data train --meta-file none: the"),
        (
            PLAIN | {"lower_data": "meta"},
            "--weighting none --lower-data meta --meta-file none: the meta loss needs --meta-file",
        ),
        (
            NET | {"upper_optimizer": "lazy-adam"},
            "--upper-optimizer lazy-adam --weighting net: lazy-adam moves the rows of a table",
        ),
        (
            DOMAIN | {"upper_optimizer": "lazy-adam"},
            "--upper-optimizer lazy-adam --weighting domain: lazy-adam moves the rows of a table",
        ),
        (NET | {"normalise": "table"}, "--normalise table --weighting net: a net has no table"),
        (
            TABLE | {"route": "ghost", "order": "lower-first"},
            "--route ghost --order lower-first: ghost needs the meta gradient before the lower "
            "step: use --order upper-first, or --route per-example",
        ),
        (
            TABLE | {"attention": "flash", "route": "jvp"},
            "--attention flash --hypergradient one-step --route jvp: FlashAttention can be "
            "differentiated once, and backwards: use --attention sdpa, or",
        ),
        (
            TABLE | {"attention": "flash", "hypergradient": "unrolled"},
            "--attention flash --hypergradient unrolled --route auto: FlashAttention can be",
        ),
        (
            TABLE | {"route": "dot", "batch_size": 2},
            "--route dot --batch-size 2: dot takes one example per micro-batch: use auto, or "
            "--batch-size 1 with a higher --accumulation",
        ),
    ],
)
def test_contradictions_name_the_options_and_what_to_change(given, message):
    assert refusal(given).startswith(message)


@pytest.mark.parametrize(
    "given",
    [
        PLAIN,
        NET,
        TABLE,
        DOMAIN,
        PLAIN
        | {"lower_data": "meta", "meta_file": "m", "loss_target": "pairs", "aggregation": "min"},
        PLAIN | {"weights_file": "w"},
        TABLE | {"bound_low": -1.0, "bound_high": 3.0, "normalise": "table", "prior": 0.5},
        TABLE | {"upper_optimizer": "lazy-adam", "upper_betas": (0.5, 0.9)},
        TABLE | {"route": "dot", "batch_size": 1, "normalise": "none"},
        NET | {"route": "ghost", "hidden": 3, "layers": 2, "features": ("loss",)},
        DOMAIN | {"bound": "sigmoid", "bound_high": 3.0, "upper_weight_decay": 0.1},
        NET | {"upper_optimizer": "sgd"},
        NET | {"init_from": "y"},
        NET | {"resume": "./o", "on_existing": "number", "save_every": 3, "keep_checkpoints": 0},
        NET | {"lower_schedule": "constant"},
    ],
)
def test_what_is_read_and_every_default_is_accepted(given):
    options = train_options(**given)
    check_together(options)
    assert flatten(options) == {n: e.default for n, e in ENTRIES.items()} | given


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_presets_hold_nothing_idle(preset):
    kind = ColdStartOptions if preset.stem.endswith("cold-start") else TrainOptions
    check_together(resolve(kind, {"config": preset.stem}))


def test_cold_start_is_checked_too():
    given = {"train_file": "t", "output_dir": "o", "model": "x", "lower_warmup": 0.5}
    check_together(cold_start_options(**given))
    given["lower_schedule"] = "constant"
    assert "--lower-warmup 0.5" in refusal(given, cold_start_options)


def test_what_the_chosen_variants_do_not_hold_is_refused():
    """Nothing that was given gets lost on the way to the groups."""
    for values in VARIANTS:
        base = NET | values
        if base.get("weighting") == "none":
            del base["meta_file"]
        held = flatten(train_options(**base))
        for name, entry in ENTRIES.items():
            value = other_value(entry)
            try:
                options = train_options(**base | {name: value})
            except OptionError:
                continue
            assert flatten(options) == held | {name: value}


VARIANTS = [
    *({"weighting": name} for name in ("net", "table", "domain", "none")),
    *({"hypergradient": name} for name in ("one-step", "unrolled", "implicit", "penalty")),
]


def other_value(entry):
    """A value that is not the default."""
    kind, many = element(entry.hint)
    if many:
        return ("label",) if entry.default == () else entry.default[:-1]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != entry.default)
    if kind is bool:
        return not entry.default
    return "x" if kind is str else 7


RUNS = {
    "net": {},
    "net of labels": {"features": ("label",)},
    "net, sgd": {"upper_optimizer": "sgd", "bound": "softplus"},
    "table": {"weighting": "table", "bound": "clip"},
    "domain": {"weighting": "domain", "bound": "softplus"},
    "none": {"weighting": "none"},
    "none, not evaluated": {"weighting": "none", "test_file": None},
    "meta": {"weighting": "none", "lower_data": "meta"},
    "constant": {"weighting": "none", "lower_schedule": "constant", "lower_warmup": 0.05},
}


@pytest.mark.parametrize("name", RUNS)
def test_whatever_a_run_does_not_read_would_be_refused(task, tmp_path, monkeypatch, name):
    """The conditions are complete: they hold for what runs do, not for what is said of them."""
    read_only_what_is_used(monkeypatch)
    given = task.train(tmp_path / "run", steps=2, **RUNS[name])
    check_together(given)
    options, seen = recorded(given)
    run_training(options)
    assert not_read(TrainOptions, seen) <= set(unread(TrainOptions, flatten(given)))


def test_a_refused_run_leaves_no_directory(task, tmp_path):
    options = replace(
        task.train(tmp_path / "run"), weighting=NetOptions(bound="sigmoid", bound_low=0.5)
    )
    with pytest.raises(OptionError, match="--bound-low"):
        run_training(options)
    assert not (tmp_path / "run").exists()


def test_what_a_resumed_run_may_change():
    """Everything else is compared with the checkpoint."""
    kinds = {}
    for name, entry in ENTRIES.items():
        kinds.setdefault(entry.on_resume, set()).add(name)
    assert kinds["file"] == {"train_file", "meta_file", "weights_file"}
    assert kinds["path"] == {"model", "init_from", "image_root"}
    assert kinds["free"] == {
        *("resume", "output_dir", "on_existing", "progress", "threads", "workers"),
        *("log_every", "save_every", "keep_checkpoints", "on_trouble", "execution"),
        *("eval_every", "keep_best"),
        *("dev_file", "test_file", "sanity_check", "on_bad_row", "max_bad_rows"),
        "initial_loss",
        *(
            "device",
            "precision",
            "attention",
            "activation_checkpointing",
            *("lora_save", "profile", "frozen_activations_limit", "cache_dir"),
        ),  # but see identity
    }
