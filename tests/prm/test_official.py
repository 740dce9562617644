"""The vocabulary mode of both levels against DreamPRM-1.5's formulas, written anew.

There the whole sequence goes through the head and a softmax over the vocabulary; a target holds the
label's token where one is judged and -1 elsewhere; losses and scores pick from it.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from prm.aggregations import mean
from prm.losses import outcome_loss, step_cross_entropy
from prm.models.model import step_logits
from prm.scoring import solution_scores
from tests.prm.tiny import SYSTEM, example, internvl, save_image


@pytest.fixture
def judged(tmp_path):
    """Model, batch of one, logits of every token and the original's target, for three solutions."""
    prm = internvl()
    collator = prm.collator(system_prompt=SYSTEM, context="gold")
    image = save_image(tmp_path / "image.png", 100, 60, seed=1)
    found = []
    for labels in ((1.0, 0.0, 1.0), (0.0, 0.0), (1.0, 1.0, 0.0, 1.0, 1.0)):
        item = example("a", len(labels), (image,), labels)
        batch = collator([item])
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            logits = prm.model(**inputs).logits
        target = torch.full(logits.shape[:2], -1)
        signs = [prm.plus_id if step.label == 1 else prm.minus_id for step in item.steps]
        target[0, batch["label_positions"][0]] = torch.tensor(signs)
        # Behind each judged position but the last, the sequence holds the label itself.
        places = (target[0] != -1).nonzero().flatten()[:-1]
        assert batch["input_ids"][0, places + 1].tolist() == signs[:-1]
        found.append((prm, batch, logits, target))
    return found


def test_lower_loss(judged):
    for prm, batch, logits, target in judged:
        theirs = cross_entropy(logits[target != -1], target[target != -1])
        ours = step_cross_entropy(
            step_logits(prm, {}, batch, full_vocab=True),
            batch["labels"],
            batch["step_mask"],
            full_vocab=True,
        )
        torch.testing.assert_close(ours, theirs[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("loss_target", ["+", "both"])
def test_upper_loss(judged, loss_target, right):
    for prm, batch, logits, target in judged:
        probs = logits.softmax(-1)[target != -1]
        label = torch.tensor(float(right), dtype=torch.float64)
        if loss_target == "+":
            theirs = mse_loss(probs[:, prm.plus_id].mean(), label)
        else:
            chosen = prm.plus_id if right else prm.minus_id
            theirs = mse_loss(probs[:, chosen].mean(), torch.ones_like(label))
        scores = solution_scores(
            step_logits(prm, {}, batch, full_vocab=True), batch["step_mask"], mean, full_vocab=True
        )
        ours = outcome_loss(scores, label[None], loss_target)
        torch.testing.assert_close(ours, theirs[None], rtol=1e-12, atol=0)
