"""Runs that keep what the frozen front of the model computes: the same bits, each example once."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import prm.activations.batches
from recipes.models.frozen import CACHE
from recipes.options.parse import changed
from recipes.options.values import OptionError
from recipes.train.cold_start import run_cold_start
from recipes.train.training import run_training
from tests.tiny_task import altered, model_bits, read_lines

LAYERS = ("vision_tower", "multi_modal_projector", "embed_tokens", "language_model.layers.0")
FRONTS = {
    "layers": LAYERS,
    "image features": ("vision_tower", "multi_modal_projector"),
    "vision tower": ("vision_tower",),
}
TABLE = {"weighting": "table", "bound": "clip", "normalise": "table"}
WEIGHTINGS = {
    "net": {"weighting": "net", "reference_features": False},
    "table": {**TABLE, "route": "dot", "batch_size": 1},
    "pairs": {"weighting": "domain", "loss_target": "pairs"},
    "in place": {**TABLE, "batch_size": 1, "execution": "resident"},
}


@pytest.fixture
def computed(monkeypatch):
    """What the frozen front has computed: one entry per example, or per its pictures."""
    sizes: list[int] = []
    real = prm.activations.batches.frozen_states

    def counting(model, boundary, inputs):
        sizes.append(len(next(iter(inputs.values()))))
        return real(model, boundary, inputs)

    monkeypatch.setattr(prm.activations.batches, "frozen_states", counting)
    return sizes


@pytest.mark.parametrize("freeze", FRONTS.values(), ids=FRONTS)
def test_with_batches_of_one_the_bits_are_those_of_a_run_without(task, tmp_path, freeze):
    single = {**TABLE, "batch_size": 1, "accumulation": 2, "meta_batch_size": 1}
    single |= {"freeze": freeze, "eval_batch_size": 1}
    plain = run_training(task.train(tmp_path / "plain", **single))
    kept = run_training(task.train(tmp_path / "kept", **single, frozen_activations="memory"))
    assert model_bits(kept) == model_bits(plain)
    assert (kept / "weights.jsonl").read_bytes() == (plain / "weights.jsonl").read_bytes()
    assert (kept / "log.jsonl").read_bytes() == (plain / "log.jsonl").read_bytes()
    auc = [json.loads((run / "results.json").read_text())["step_auc"] for run in (kept, plain)]
    assert auc[0] == auc[1]


@pytest.mark.parametrize("more", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_the_bits_do_not_depend_on_where_and_how_much_is_kept(task, tmp_path, more):
    train = partial(task.train, freeze=LAYERS, initial_loss=False, **more)
    memory = run_training(train(tmp_path / "memory", frozen_activations="memory"))
    for name, kept in (
        ("none", {"frozen_activations": "memory", "frozen_activations_limit": 0.0}),
        ("some", {"frozen_activations": "memory", "frozen_activations_limit": 1e-4}),
        ("disk", {"frozen_activations": "disk"}),
    ):
        run = run_training(train(tmp_path / name, **kept))
        assert model_bits(run) == model_bits(memory)
        assert (run / "weights.jsonl").read_bytes() == (memory / "weights.jsonl").read_bytes()


def test_with_padded_batches_the_losses_are_those_of_a_run_without_up_to_rounding(task, tmp_path):
    train = partial(task.train, freeze=LAYERS, initial_loss=False, **TABLE)
    plain = run_training(train(tmp_path / "plain"))
    kept = run_training(train(tmp_path / "kept", frozen_activations="memory"))
    expected, found = (
        [line["lower_loss"] for line in read_lines(run / "log.jsonl")] for run in (plain, kept)
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_computes_the_front_of_each_example_once(task, tmp_path, computed):
    short = {"draw": 3, "batch_size": 2, "steps": 6, "freeze": LAYERS}
    run_cold_start(task.cold_start(tmp_path / "run", **short, frozen_activations="memory"))
    assert computed == [1] * 4  # each of three, and one to compare bits at the start
    run_cold_start(
        task.cold_start(
            tmp_path / "again",
            **short,
            frozen_activations="memory",
            frozen_activations_limit=0.0,
        )
    )
    assert len(computed) == 4 + 1 + 12


def test_files_that_a_run_scores_go_through_the_front_once(task, tmp_path, computed):
    """Test set, dev set after each step, initial losses, gradient features: where there is room."""
    files = [task.data / f"{name}.jsonl" for name in ("dev", "test", "train")]
    read = [
        (row["images"], row["question"], [step["text"] for step in row["steps"]])
        for file in files
        for row in read_lines(file)
    ]
    scored = len({json.dumps(one) for one in read})  # what differs in tokens or pictures
    run = partial(
        task.train,
        freeze=LAYERS,
        steps=2,
        dev_file=str(files[0]),
        eval_every=1,
        weighting="net",
        features=("label", "gradient"),
        gradient_features=2,
    )
    run_training(run(tmp_path / "levels", frozen_activations="disk"))
    levels = len(computed)
    run_training(run(tmp_path / "kept", frozen_activations="memory"))
    assert len(computed) == levels + levels + scored
    computed.clear()
    folder = {"frozen_activations": "disk", "cache_dir": str(tmp_path / "shared")}
    first = run_training(run(tmp_path / "first", **folder))
    assert scored + 1 < len(computed) < levels + scored  # the lower level finds what was scored
    assert model_bits(first) == model_bits(tmp_path / "kept")


def test_runs_share_a_folder_and_mend_what_is_damaged_in_it(task, tmp_path, computed, capsys):
    start = partial(
        task.cold_start,
        draw=3,
        batch_size=3,
        freeze=LAYERS,
        frozen_activations="disk",
        cache_dir=str(tmp_path / "kept"),
    )
    first = run_cold_start(start(tmp_path / "first", steps=2))
    assert len(computed) == 3 + 1
    assert not (first / CACHE).exists()
    files = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert len(files) == 3
    again = run_cold_start(start(tmp_path / "again", steps=2))
    assert len(computed) == 4 + 1
    files[0].write_bytes(files[0].read_bytes()[:-5])
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    third = run_cold_start(start(tmp_path / "third", steps=2))
    assert len(computed) == 5 + 1 + 2
    assert capsys.readouterr().out.count("it is computed again") == 2
    assert model_bits(first) == model_bits(again) == model_bits(third)
    later = run_training(
        task.train(
            tmp_path / "later",
            init_from=str(first / "model"),
            train_file=str(task.data / "train.jsonl"),
            freeze=LAYERS,
            weighting="none",
            batch_size=2,
            steps=2,
            frozen_activations="disk",
            cache_dir=str(tmp_path / "kept"),
        )
    )
    assert later.is_dir()
    assert len({path.parent for path in (tmp_path / "kept").rglob("*.safetensors")}) == 1


def test_another_front_does_not_read_what_is_there(task, tmp_path, computed):
    folder = str(tmp_path / "kept")
    kept = {"frozen_activations": "disk", "cache_dir": folder, "draw": 2}
    short = {"batch_size": 2, "steps": 1}
    moved = run_cold_start(task.cold_start(tmp_path / "moved", **short, lower_lr=0.1, freeze=()))
    run_cold_start(task.cold_start(tmp_path / "first", **short, **kept, freeze=LAYERS))
    before = len(computed)
    other = changed(
        task.cold_start(tmp_path / "second", **short, **kept, freeze=LAYERS),
        model=str(moved / "model"),
    )
    run_cold_start(other)
    assert len(computed) == 2 * before == 6


def test_a_resumed_run_reads_what_is_kept_and_ends_with_the_same_bits(task, tmp_path, computed):
    options = partial(
        task.cold_start,
        draw=3,
        batch_size=1,
        freeze=LAYERS,
        frozen_activations="disk",
        save_every=2,
    )
    whole = run_cold_start(options(tmp_path / "whole", steps=4))
    computed.clear()
    part = options(tmp_path / "part", steps=4)

    class Cut(Exception):
        pass

    real = prm.activations.batches.FrozenFront.__call__
    calls = []

    def cutting(self, batch):
        calls.append(1)
        if len(calls) == 1 + 3:  # one at the start, then one for each step
            raise Cut
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prm.activations.batches.FrozenFront, "__call__", cutting)
        with pytest.raises(Cut):
            run_cold_start(part)
    assert len(computed) == 1 + 2
    resumed = run_cold_start(changed(part, resume=str(tmp_path / "part")))
    assert len(computed) == 3 + 1 + 1  # the third example alone is new
    assert model_bits(resumed) == model_bits(whole)
    (resumed / "results.json").unlink()
    with pytest.raises(OptionError, match=r"--frozen-activations none \(checkpoint: disk\)"):
        run_cold_start(changed(part, resume=str(tmp_path / "part"), frozen_activations="none"))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"freeze": ()}, r"nothing to keep; give --freeze"),
        ({"freeze": ("embed_tokens", "language_model.layers.0")}, "nothing to keep"),
        ({"frozen_activations": "none", "frozen_activations_limit": 1.0}, "has no effect"),
        ({"cache_dir": "x", "frozen_activations": "memory"}, "has no effect"),
    ],
)
def test_what_would_have_no_effect_is_refused(task, tmp_path, more, match):
    options = {"frozen_activations": "memory", "freeze": LAYERS, **more}
    with pytest.raises(OptionError, match=match):
        run_cold_start(task.cold_start(tmp_path / "run", **options))


def test_a_front_of_pictures_needs_pictures(task, tmp_path):
    def without(_, row):
        return {**row, "images": [], "question": row["question"].replace("<image>", "")}

    file = altered(task.data / "train.jsonl", tmp_path / "text.jsonl", without)
    options = task.cold_start(
        tmp_path / "run", train_file=str(file), frozen_activations="memory", steps=1
    )
    with pytest.raises(OptionError, match="no example has a picture and the vision tower"):
        run_cold_start(options)


def test_adapters_behind_a_frozen_tower(task, tmp_path, computed):
    pytest.importorskip("peft")
    common = {"lora_rank": 2, "lora_targets": ("q_proj",), "batch_size": 1, "draw": 3, "steps": 6}
    freeze = {"freeze": FRONTS["image features"]}
    plain = run_cold_start(task.cold_start(tmp_path / "plain", **common, **freeze))
    kept = run_cold_start(
        task.cold_start(tmp_path / "kept", **common, **freeze, frozen_activations="memory")
    )
    assert len(computed) == 3 + 1
    files = [run / "adapter" / "adapter_model.safetensors" for run in (plain, kept)]
    expected, found = map(load_file, files)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(OptionError, match="nothing to keep"):
        run_cold_start(
            task.cold_start(
                tmp_path / "all", **{**common, "lora_targets": ()}, frozen_activations="memory",
                freeze=(),
            )
        )  # fmt: skip
