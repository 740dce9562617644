"""Thousands of damaged files of every format in `make fuzz`, the same few hundred in the suite."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from bilevel import tree
from bilevel.autodiff.random_state import capture
from prm.data.reader import checked_rows
from prm.inputs.tiles import image_size, read_image
from prm.names import FORMAT_NAMES
from prm.schema import DataError
from recipes.options.parse import resolve, to_yaml
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError
from recipes.run.checkpoints import Checkpoints, Progress
from recipes.train.data import _read_weights
from recipes.use.scores_file import read_scores
from tests.fuzz.bulk import changed, damaged_bytes, damaged_file
from tests.fuzz.checks import check_examples, check_refusal, read_rows
from tests.fuzz.good_files import PLAIN, SCORES, TRAIN, WEIGHTS, YAML, pictures, weightings
from tests.fuzz.strategies import RAW, TEXTS, dumps
from tests.fuzz.trial import EXAMPLES, SUITE, attempt
from tests.prm.data.formats.good_records import GOOD
from tests.recipes.run.toy_problem import TOY, toy
from weighting import load_weighting, row_index

TRIES = EXAMPLES or SUITE


def generators():
    """One for each try: of this run, or the same every time."""
    start = random.SystemRandom().randrange(2**60) if EXAMPLES else 0
    return map(random.Random, range(start, start + TRIES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bulk")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("format", [*FORMAT_NAMES, "auto"])
def test_formats(folder, format):
    path = folder / "data.jsonl"
    records = list(GOOD.values()) if format == "auto" else [GOOD[format]]
    for rng in generators():
        path.write_bytes(damaged_file(rng, records))
        found = attempt(format, lambda: read_rows(path, format), (DataError,))
        if isinstance(found, DataError):
            check_refusal(found, path)
        elif rng.random() < 0.1:
            ids = [example.id for example in found]
            check_examples([e for e in found if ids.count(e.id) == 1], path)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["scores", "weights", "read all"])
def test_files(folder, name):
    path = folder / "file.jsonl"
    ids = row_index(["a0", "a1"])
    records, read = {
        "scores": (SCORES, lambda: read_scores(path)),
        "weights": (WEIGHTS, lambda: _read_weights(str(path), ids)),
        "read all": (list(GOOD.values()), lambda: list(checked_rows(path))),
    }[name]
    for rng in generators():
        path.write_bytes(damaged_file(rng, records))
        found = attempt(name, read, (DataError, OptionError))
        if isinstance(found, torch.Tensor):
            assert found.isfinite().all()


@pytest.mark.timeout(3600)
def test_weightings(folder):
    store = folder / "weighting"
    kinds = weightings(store)
    for rng in generators():
        good = rng.choice(kinds)
        shutil.rmtree(store)
        store.mkdir()
        bad = rng.choice(sorted(good))
        for name, content in good.items():
            if name == bad and name.endswith(".json") and rng.random() < 0.6:
                content = dumps(changed(rng, json.loads(content))).encode("utf-8", "replace")
            elif name == bad:
                content = damaged_bytes(rng, content)
            (store / name).write_bytes(content)
        found = attempt("weighting", lambda: load_weighting(store), (ValueError,))
        assert not isinstance(found, ValueError) or str(store) in str(found)


@pytest.mark.timeout(3600)
def test_presets(folder):
    path = folder / "preset.yaml"
    plain = to_yaml(PLAIN).encode()
    names = [*TRAIN, "config", "no_such", "lower-lr", "threads"]
    for rng in generators():
        if rng.random() < 0.3:
            content = damaged_bytes(rng, plain)
        else:
            values = {name: json.dumps(value) for name, value in TRAIN.items()}
            for _ in range(rng.randint(1, 3)):
                values[rng.choice(names)] = rng.choice(rng.choice((YAML, RAW, TEXTS)))[:3000]
            text = "".join(f"{name}: {value}\n" for name, value in values.items())
            content = text.encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        attempt("preset", lambda: resolve(TrainOptions, {"config": str(path)}), (OptionError,))


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on damaged tags
def test_images(folder):
    whole = pictures(folder)
    path = folder / "image"
    for rng in generators():
        path.write_bytes(damaged_bytes(rng, rng.choice(whole)))
        for read in (read_image, image_size):
            found = attempt("image", lambda read=read: read(path), (DataError,))
            assert not isinstance(found, DataError) or found.file == path


@pytest.mark.timeout(3600)
def test_checkpoints(folder):
    """Bits that changed on the disk are found, whichever they are."""
    _, state = toy()
    checkpoints = Checkpoints(folder / "checkpoints", every=1, keep=0, identity=TOY)
    saved = checkpoints.save(Progress(state, capture(state.lower_params)))
    good = {path.name: path.read_bytes() for path in saved.iterdir()}
    for rng in generators():
        bad = rng.choice(sorted(good))
        for name, content in good.items():
            if name == bad and name == "run.json" and rng.random() < 0.5:
                content = dumps(changed(rng, json.loads(content))).encode("utf-8", "replace")
            elif name == bad:
                content = damaged_bytes(rng, content)
            (saved / name).write_bytes(content)
        found = attempt("checkpoint", lambda: checkpoints.load(saved, state), (OptionError,))
        if isinstance(found, Progress):
            before, after = tree.flatten(state), tree.flatten(found.state)
            assert all(torch.equal(before[name], after[name]) for name in before)
        else:
            assert str(saved) in str(found)
            assert list(checkpoints._due()) in ([], [saved])
