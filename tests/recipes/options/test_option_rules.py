"""An option that would do nothing is refused if it was given, and never at its default."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

import recipes.run.directory
import recipes.run.resume
import recipes.train.training
from recipes.options.rules import check_together, unread
from recipes.options.train import PRESETS, ColdStartOptions, OptionError, TrainOptions, resolve
from recipes.train.training import run_training

PLAIN = TrainOptions(train_file="t", output_dir="o", weighting="none", test_file="c")
NET = TrainOptions(train_file="t", output_dir="o", meta_file="m")
TABLE = replace(NET, weighting="table", bound="clip")
DOMAIN = replace(NET, weighting="domain", bound="softplus")


def refusal(options) -> str:
    with pytest.raises(OptionError) as error:
        check_together(options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            replace(PLAIN, upper_lr="0.06", order="lower-first", rollback=True),
            "--upper-lr 0.06, --order lower-first, --rollback have no effect with "
            "--weighting none: leave them out, or use --weighting net, table or domain",
        ),
        (
            replace(PLAIN, meta_file="m", meta_batch_size=8),
            "--meta-batch-size 8 has no effect with --weighting none: leave it out, or use "
            "--weighting net, table or domain; --meta-file m has no effect with --weighting none "
            "--lower-data train: leave it out, or use a weighting or --lower-data meta",
        ),
        (
            replace(NET, bound_low=0.5),
            "--bound-low 0.5 has no effect with --bound sigmoid: leave it out, or use "
            "--bound clip or clamp",
        ),
        (
            replace(TABLE, bound="softplus", bound_high=3.0),
            "--bound-high 3.0 has no effect with --bound softplus: leave it out, or use "
            "--bound clip, clamp or sigmoid",
        ),
        (
            replace(DOMAIN, prior=0.5, normalise="none"),
            "--prior 0.5 has no effect with --weighting domain: leave it out, or use "
            "--weighting net or table; --normalise none has no effect with --weighting domain "
            "--weights-file none: leave it out, or use --weighting net or table, or --weights-file",
        ),
        (
            replace(TABLE, features=("loss", "label"), reference_features=False, hidden=3),
            "--features loss label, --no-reference-features, --hidden 3 have no effect with "
            "--weighting table: leave them out, or use --weighting net",
        ),
        (
            replace(NET, features=("label",), reference_features=False),
            "--no-reference-features has no effect with --features label: leave it out, or use a "
            "feature that depends on the model",
        ),
        (
            replace(NET, upper_optimizer="sgd", upper_betas=(0.5, 0.9), upper_weight_decay=0.1),
            "--upper-betas 0.5 0.9, --upper-weight-decay 0.1 have no effect with "
            "--upper-optimizer sgd: leave them out, or use --upper-optimizer adam or lazy-adam",
        ),
        (
            replace(NET, weights_file="w", lower_data="meta"),
            "--weights-file w, --lower-data meta have no effect with --weighting net: leave them "
            "out, or use --weighting none",
        ),
        (
            replace(PLAIN, weights_file="w", lower_data="meta", meta_file="m"),
            "--weights-file w has no effect with --lower-data meta: leave it out, or use "
            "--lower-data train",
        ),
        (
            replace(PLAIN, test_file=None, aggregation="min", eval_batch_size=8),
            "--aggregation min has no effect with --weighting none --dev-file none --test-file "
            "none: leave it out, or give candidates to score; --eval-batch-size 8 has no effect "
            "with --weighting none --dev-file none --test-file none: leave it out, or give "
            "candidates to score",
        ),
        (
            replace(NET, model="x", init_from="y"),
            "--model x has no effect with --init-from y: leave it out, or use --init-from none",
        ),
        (
            replace(NET, lower_schedule="constant", lower_warmup=0.1),
            "--lower-warmup 0.1 has no effect with --lower-schedule constant: leave it out, or use "
            "--lower-schedule cosine",
        ),
        (
            replace(NET, keep_checkpoints=5),
            "--keep-checkpoints 5 has no effect with --save-every 0: leave it out, or use "
            "--save-every 1 or more",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused_with_reason_and_remedy(options, message):
    assert refusal(options) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            replace(NET, resume="p"),
            "--resume p --output-dir o: a resumed run stays in its directory: leave out "
            "--output-dir",
        ),
        (replace(NET, meta_file=None), "--weighting net --lower-data train --meta-file none: the"),
        (
            replace(PLAIN, lower_data="meta"),
            "--weighting none --lower-data meta --meta-file none: the meta loss needs --meta-file",
        ),
        (
            replace(NET, upper_optimizer="lazy-adam"),
            "--upper-optimizer lazy-adam --weighting net: lazy-adam moves the rows of a table",
        ),
        (
            replace(DOMAIN, upper_optimizer="lazy-adam"),
            "--upper-optimizer lazy-adam --weighting domain: lazy-adam moves the rows of a table",
        ),
        (replace(NET, normalise="table"), "--normalise table --weighting net: a net has no table"),
        (
            replace(TABLE, route="ghost", order="lower-first"),
            "--route ghost --order lower-first: ghost needs the meta gradient before the lower "
            "step: use --order upper-first, or --route per-example",
        ),
        (
            replace(TABLE, route="dot", batch_size=2),
            "--route dot --batch-size 2: dot takes one example per micro-batch: use auto, or "
            "--batch-size 1 with a higher --accumulation",
        ),
    ],
)
def test_contradictions_name_the_options_and_what_to_change(options, message):
    assert refusal(options).startswith(message)


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        NET,
        TABLE,
        DOMAIN,
        replace(PLAIN, lower_data="meta", meta_file="m", loss_target="pairs", aggregation="min"),
        replace(PLAIN, weights_file="w"),
        replace(TABLE, bound_low=-1.0, bound_high=3.0, normalise="table", prior=0.5),
        replace(TABLE, upper_optimizer="lazy-adam", upper_betas=(0.5, 0.9)),
        replace(TABLE, route="dot", batch_size=1, normalise="none"),
        replace(NET, route="ghost", hidden=3, layers=2, features=("loss",)),
        replace(DOMAIN, bound="sigmoid", bound_high=3.0, upper_weight_decay=0.1),
        replace(NET, upper_optimizer="sgd"),
        replace(NET, init_from="y"),
        replace(NET, resume="./o", on_existing="number", save_every=3, keep_checkpoints=0),
        replace(NET, lower_schedule="constant"),
        ColdStartOptions(train_file="t", output_dir="o", model="x", lower_warmup=0.5),
    ],
)
def test_what_is_read_and_every_default_is_accepted(options):
    check_together(options)


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_presets_hold_nothing_idle(preset):
    kind = ColdStartOptions if preset.stem.endswith("cold-start") else TrainOptions
    check_together(resolve(kind, {"config": preset.stem}))


def test_cold_start_is_checked_too():
    options = ColdStartOptions(train_file="t", output_dir="o", lower_schedule="constant")
    check_together(options)
    assert "--lower-warmup 0.2" in refusal(replace(options, lower_warmup=0.2))


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
    """The table of rules is complete: it holds for what runs do, not for what it says of them."""
    monkeypatch.setattr(recipes.run.directory, "to_yaml", lambda options: "")
    monkeypatch.setattr(recipes.run.resume, "identity", lambda options, model: {})
    monkeypatch.setattr(recipes.train.training, "check_together", lambda options: None)
    seen: set[str] = set()

    class Recording(TrainOptions):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    given = task.train(tmp_path / "run", steps=2, **RUNS[name])
    check_together(given)
    options = Recording(**{f.name: getattr(given, f.name) for f in fields(TrainOptions)})
    seen.clear()
    run_training(options)
    assert {f.name for f in fields(TrainOptions)} - seen <= set(unread(given))


def test_a_refused_run_leaves_no_directory(task, tmp_path):
    options = task.train(tmp_path / "run", bound_low=0.5)
    with pytest.raises(OptionError, match="--bound-low"):
        run_training(options)
    assert not (tmp_path / "run").exists()
