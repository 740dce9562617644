"""No code of a checkpoint runs, and only safetensors files of its own folder are read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import prm
from prm.models.model import load_prm, save_prm
from prm.models.native import load_config
from prm.models.untrusted import ModelError
from prm.models.weight_files import DIGESTS
from tests.prm.tiny import internvl, qwen, qwen2_tokenizer, qwen2_vl
from tests.prm.tiny_processed import llava

AUTO = [
    "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText",
    "AutoModelForVision2Seq", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor",
    "AutoFeatureExtractor", "AutoVideoProcessor", "AutoImageProcessorFast",
]  # fmt: skip
FILES = [
    "config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "video_preprocessor_config.json",
]  # fmt: skip
CLASSES = {  # of an unknown class, transformers has none of its own
    "image_processor_type": "Evil", "processor_class": "Evil", "tokenizer_class": "Evil",
    "feature_extractor_type": "Evil", "video_processor_type": "Evil",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Good folders of every way in which a model and its processor are loaded."""
    root = tmp_path_factory.mktemp("models")
    models = {
        "internvl": internvl(dtype=torch.float32),
        "qwen2": qwen(qwen2_tokenizer(), dtype=torch.float32),
        "qwen2-vl": qwen2_vl(qwen2_tokenizer(), dtype=torch.float32),
        "llava": llava(),
    }
    for name, model in models.items():
        save_prm(model, {}, root / name)
    return root


EVERYWHERE = [
    (kind, FILES, classes)
    for kind in ("internvl", "qwen2", "qwen2-vl", "llava")
    for classes in ({}, CLASSES, dict.fromkeys(CLASSES))
]
ONE_FILE = [(kind, [name], CLASSES) for kind in ("internvl", "llava") for name in FILES]


@pytest.mark.parametrize(("kind", "files", "classes"), [*EVERYWHERE, *ONE_FILE])
def test_no_code_of_a_checkpoint_runs(folders, tmp_path, monkeypatch, kind, files, classes):
    """Nor is anybody asked: the answer would be yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append("asked") or "y")
    folder = tmp_path / "model"
    shutil.copytree(folders / kind, folder)
    for name in files:
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        content["auto_map"] = dict.fromkeys(AUTO, "evil.Evil")
        content["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        if name != "config.json":
            content |= classes
            content = {key: value for key, value in content.items() if value is not None}
        path.write_text(json.dumps(content))
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\n"
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    try:
        loaded = load_prm(folder)
    except ModelError:
        assert classes  # without unknown classes, transformers' own are used
    else:
        assert type(loaded.model).__module__.startswith("transformers.")
        assert type(loaded.tokenizer).__module__.startswith("transformers.")
    assert not asked
    assert not marker.exists()


def test_the_kind_of_every_number_is_checked_before_lists_are_built(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for value in (10_001, 10**12, 1e300):
        (folder / "config.json").write_text(
            json.dumps({"model_type": "qwen2", "num_hidden_layers": value})
        )
        with pytest.raises(ModelError, match="num_hidden_layers: expected at most 10000"):
            load_config(str(folder))


def test_a_tied_head_may_be_missing_and_an_untied_one_may_not(tmp_path):
    saved = qwen(qwen2_tokenizer(), tied=True, dtype=torch.float32)
    save_prm(saved, {}, tmp_path / "tied")
    weights = tmp_path / "tied" / "model.safetensors"
    assert "lm_head.weight" not in load_file(weights)
    loaded = load_prm(tmp_path / "tied").model
    assert torch.equal(loaded.lm_head.weight, saved.model.model.embed_tokens.weight)
    config = tmp_path / "tied" / "config.json"
    config.write_text(config.read_text().replace('ngs": true', 'ngs": false'))
    with pytest.raises(ModelError, match=r"missing: lm_head\.weight; use"):
        load_prm(tmp_path / "tied")


def test_a_package_that_is_not_installed_is_named(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders / "qwen2", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"(?i)bitsandbytes|accelerate"):
        load_prm(folder)


def test_a_name_on_a_hub_is_checked_like_a_folder(folders, tmp_path):
    """The cache of a hub holds links; it is read here without a network."""
    missing = "model.norm.weight"
    for name in ("good", "cut"):
        repository = tmp_path / "hub" / f"models--org--{name}"
        snapshot = repository / "snapshots" / ("0" * 40)
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        for file in (folders / "qwen2").iterdir():
            if file.name != DIGESTS:
                shutil.copy(file, repository / "blobs" / file.name)
                (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    weights = repository / "blobs" / "model.safetensors"
    state = load_file(weights)
    del state[missing]
    save_file(state, weights, metadata={"format": "pt"})
    code = (
        "from prm import load_prm\n"
        "print('loaded', sum(x.numel() for x in load_prm('org/good').model.parameters()))\n"
        "try: load_prm('org/cut')\n"
        "except ValueError as error: print(error)\n"
        "try: load_prm('org/absent')\n"
        "except OSError as error: print(error)\n"
    )
    environment = {
        **os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(prm.__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    loaded, refused, absent = done.stdout.splitlines()
    good = load_prm(folders / "qwen2").model
    assert loaded == f"loaded {sum(value.numel() for value in good.parameters())}"
    assert refused.startswith("org/cut: expected the tensors of the model")
    assert f"missing: {missing}; use" in refused
    assert absent == (
        "expected config.json in org/absent, found none; is it a model? "
        "Or was the hub out of reach?"
    )
