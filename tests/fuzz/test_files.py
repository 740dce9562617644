"""Scores, weights, weightings, presets and images: damaged ones are read right or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from prm.inputs.tiles import image_size, read_image
from prm.schema import DataError
from recipes.options.parse import resolve, to_yaml
from recipes.options.train import TrainOptions
from recipes.options.values import OptionError
from recipes.train.data import _read_weights
from recipes.use.score import read_settings
from recipes.use.scores_file import complete_lines, read_scores, settings_path
from tests.fuzz.good_files import PLAIN, SCORES, TRAIN, WEIGHTS, YAML, pictures, weightings
from tests.fuzz.strategies import RAW, TEXTS, broken_bytes, changed, dumps, files
from tests.fuzz.trial import attempt, fuzzed
from weighting import load_weighting, row_index

SETTINGS = {"format": 1, "model": {"path": "m", "sha256": "0"}, "context": "plus"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


def test_scores(folder):
    path = folder / "scores.jsonl"

    @fuzzed()
    @given(files(SCORES))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        for row in _read(attempt("scores", lambda: read_scores(path), (DataError,)), path):
            assert row.line().encode()
            assert all(0 <= score <= 1 for score in row.step_scores)
        done = attempt("scores", lambda: complete_lines(path, ["a0", "a1"], path), (DataError,))
        assert isinstance(done, DataError) or done <= 2

    run()


def test_settings_of_scores(folder):
    path = folder / "judged.jsonl"

    @fuzzed()
    @given(files([SETTINGS]))
    def run(content: bytes) -> None:
        settings_path(path).write_bytes(content)
        found = attempt("score settings", lambda: read_settings(path), (DataError,))
        assert isinstance(found, DataError) or isinstance(found.get("model", {}), dict)

    run()


def test_weights(folder):
    path = folder / "weights.jsonl"

    @fuzzed()
    @given(files(WEIGHTS))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        ids = row_index(["a0", "a1"])
        refusals = (DataError, OptionError)
        found = attempt("weights", lambda: _read_weights(str(path), ids), refusals)
        if isinstance(found, torch.Tensor):
            assert found.shape == (2,)
            assert found.isfinite().all()

    run()


def test_weightings(folder):
    """One of the three files damaged: changed JSON, or bytes."""
    store = folder / "weighting"

    kinds = weightings(store)
    shapes = [save({"deviation": torch.zeros(n)}) for n in (0, 1, 3)]
    shapes += [save({"deviation": torch.full((2,), float("nan"))}), save({"x": torch.zeros(2)})]
    shapes += [save({"deviation": torch.zeros(2, dtype=torch.int64)})]

    @fuzzed()
    @given(st.data())
    def run(data: st.DataObject) -> None:
        good = data.draw(st.sampled_from(kinds))
        bad = data.draw(st.sampled_from(sorted(good)))
        content = good[bad]
        if bad.endswith(".json") and data.draw(st.booleans()):
            content = dumps(data.draw(changed([json.loads(content)]))).encode("utf-8", "replace")
        elif data.draw(st.integers(0, 4)) == 0:
            content = data.draw(st.sampled_from(shapes))
        else:
            content = data.draw(broken_bytes(content))
        for name, whole in good.items():
            (store / name).write_bytes(content if name == bad else whole)
        found = attempt("weighting", lambda: load_weighting(store), (ValueError,))
        if isinstance(found, ValueError):
            assert str(store) in str(found)
        else:
            weighting, params, ids, _ = found
            assert {n: t.shape for n, t in params.items()} == {
                n: t.shape for n, t in weighting.init().items()
            }
            assert len(ids) == getattr(weighting, "size", 0)

    run()


def test_presets(folder):
    path = folder / "preset.yaml"
    names = [*TRAIN, "config", "no_such", "lower-lr", "threads"]

    @st.composite
    def presets(draw: st.DrawFn) -> bytes:
        if draw(st.integers(0, 3)) == 0:
            return draw(broken_bytes(to_yaml(PLAIN).encode()))
        values = {name: json.dumps(value) for name, value in TRAIN.items()}
        for _ in range(draw(st.integers(1, 3))):
            odd = st.sampled_from(YAML) | st.sampled_from(RAW + TEXTS)
            values[draw(st.sampled_from(names))] = draw(odd)
        text = "".join(f"{name}: {value}\n" for name, value in values.items())
        return text.encode("utf-8", "surrogatepass")

    @fuzzed()
    @given(presets())
    def run(content: bytes) -> None:
        path.write_bytes(content)
        read = lambda: resolve(TrainOptions, {"config": str(path)})  # noqa: E731
        options = attempt("preset", read, (OptionError,))
        if isinstance(options, TrainOptions):
            again = folder / "again.yaml"
            again.write_text(to_yaml(options), encoding="utf-8")
            assert resolve(TrainOptions, {"config": str(again)}) == options

    run()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on damaged tags
def test_images(folder):
    whole = pictures(folder)
    path = folder / "image"

    @fuzzed()
    @given(st.sampled_from(whole).flatmap(broken_bytes))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        for read in (read_image, image_size):
            found = attempt("image", lambda read=read: read(path), (DataError,))
            assert not isinstance(found, DataError) or found.file == path

    run()


def _read(found: Any, path: Path) -> Any:
    """The rows that were read; none where they were refused with file and line."""
    if isinstance(found, DataError):
        assert found.file == path
        assert found.line is not None or found.found == "an empty file"
        return []
    return found
