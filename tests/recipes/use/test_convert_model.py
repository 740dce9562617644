"""``convert-model``: the folder that it writes is a model; mistakes are one line."""

from __future__ import annotations

from prm.models.model import load_prm
from recipes.__main__ import main
from tests.prm.models.original_checkpoint import make_original, state_of, write_original


def test_the_written_folder_is_a_model(tmp_path, capsys):
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer)
    target = tmp_path / "new"
    assert main(["convert-model", "--input", str(source), "--output", str(target)]) == 0
    count = sum(value.numel() for value in model.parameters())
    assert f"{count} parameters" in capsys.readouterr().out
    assert sum(value.numel() for value in load_prm(target).model.parameters()) == count


def test_mistakes_are_one_line(tmp_path, capsys):
    config, model, tokenizer = make_original("qwen2")
    state = state_of(model)
    del state["mlp1.3.bias"]
    source = write_original(tmp_path / "old", config, state, tokenizer)
    words = ["convert-model", "--input", str(source), "--output"]
    assert main([*words, str(tmp_path / "new")]) == 2
    assert "missing: model.multi_modal_projector.linear_2.bias" in capsys.readouterr().err
    assert main([*words, str(source)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("is not empty; remove it or choose another")


def test_damaged_models_end_in_one_line_and_status_2(tmp_path, capsys):
    config, model, tokenizer = make_original("qwen2")
    source = write_original(tmp_path / "old", config, state_of(model), tokenizer, shards=2)
    (source / "model.safetensors.index.json").write_text('{"metadata": {}}')
    words = ["convert-model", "--input", str(source), "--output", str(tmp_path / "new")]
    assert main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"bilevel-prm convert-model: --input {source}: ")
    assert "model.safetensors.index.json: weight_map: expected" in said
    (source / "config.json").write_text("[]")
    score = ["score", "--model", str(source), "--file", str(source / "config.json")]
    for command in (words, [*score, "--output", str(tmp_path / "scores.jsonl")]):
        assert main(command) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert said.endswith("config.json: expected a JSON object, found list")
