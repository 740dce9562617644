"""The command that makes the base model, at a scale that teaches it nothing."""

from __future__ import annotations

import json

from prm.models.model import load_prm
from recipes.__main__ import main


def test_base_model_loads_as_a_judge(tmp_path, capsys):
    out = tmp_path / "base"
    assert main(["data", "pretrain-base", "--out", str(out), "--scale", "0.0001"]) == 0
    accuracies = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(accuracies) == ["tower", "statements", "chat", "both", "conventions"]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    prm = load_prm(out)
    assert 1.0e6 < sum(p.numel() for p in prm.model.parameters()) < 1.3e6
    assert prm.image_tokens is not None
