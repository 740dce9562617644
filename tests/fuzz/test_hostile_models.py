"""Folders of models that are damaged, unfit or hostile: one sentence each, or the same scores."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from prm.models.model import save_prm, step_logits
from prm.models.weight_files import DIGESTS
from recipes.models.loading import load_model
from recipes.options.base import PrmOptions
from recipes.options.values import OptionError
from tests.fuzz.hostile_models import CHANGES, SAME, WITH_DIGESTS
from tests.prm.tiny import SYSTEM, example, internvl, save_image


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good folder, an example and the scores of its steps."""
    folder = tmp_path_factory.mktemp("models")
    save_prm(internvl(dtype=torch.float32), {}, folder / "good")
    item = example("a", 3, (save_image(folder / "x.png", 100, 60),))
    return folder / "good", item, scores_of(folder / "good", item)


def scores_of(folder, item):
    prm, _ = load_model(PrmOptions(model=str(folder), system_prompt=SYSTEM))
    batch = prm.collator(system_prompt=SYSTEM)([item])
    return step_logits(prm, {}, batch)


@pytest.mark.parametrize("name", CHANGES)
def test_every_folder_is_refused_in_a_sentence_or_scores_the_same(good, tmp_path, name):
    folder, item, expected = good
    change, pattern = CHANGES[name]
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    if name not in WITH_DIGESTS:
        (copy / DIGESTS).unlink(missing_ok=True)  # as in a folder that others wrote
    change(copy)
    try:
        scores = scores_of(copy, item)
    except OptionError as error:
        said = str(error)
        assert said.startswith(f"--model {copy}: ")
        assert "\n" not in said
        assert len(said) < 900
        assert re.search(pattern, said), said
    else:
        assert SAME in pattern
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)
