"""``push``: what is uploaded, what is refused, against a hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from prm.models.weight_files import DIGESTS
from recipes.__main__ import main
from recipes.evaluation.card import CARD
from recipes.train.training import run_training
from tests.recipes.use.fake_hub import TOKEN, serving

ROOT = Path(__file__).parents[3]
# huggingface_hub 2.4 itself uploads by a form that its HTTP client would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    return run_training(task.train(tmp_path_factory.mktemp("push") / "net", initial_loss=False))


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "net"))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # What was read from the environment when the client was imported.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def expected(run: Path) -> dict[str, bytes]:
    """Files of the model at the root, of the weighting in its folder, as they are."""
    files = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    return files | {f"weighting/{p.name}": p.read_bytes() for p in (run / "weighting").iterdir()}


def push(run: Path, *words: str) -> int:
    return main(["push", str(run), "--repo", "org/prm", *words])


def test_model_weighting_and_card_are_uploaded(run, hub, capsys):
    assert push(run) == 0
    files = expected(run)
    assert hub.repos == {"org/prm": {"main": files}}
    assert {CARD, "prm.json", "model.safetensors", "weighting/ids.json"} <= files.keys()
    assert hub.private == {"org/prm": False}
    (commit,) = hub.commits
    assert commit["summary"] == "Upload the process reward model of net"
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[: len(files)]] == [
        [f"{len(files[name]):,}", name] for name in [line.split()[1] for line in said[: len(files)]]
    ]
    assert {line.split()[1] for line in said[: len(files)]} == files.keys()
    total = sum(map(len, files.values()))
    words = [f"{total:,}", "bytes", "in", str(len(files)), "files", "for", "org/prm"]
    assert said[-2].split() == words
    assert said[-1] == f"uploaded: {hub.url}/org/prm/commit/{'c' * 40}"


def test_a_dry_run_says_what_and_asks_nobody(run, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert push(run, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(expected(run)) + 2
    assert said[-1] == "dry run: nothing was uploaded"
    assert hub.asked == []


def test_another_branch_of_a_private_repository(run, hub):
    assert push(run, "--private", "--revision", "v1") == 0
    assert hub.private == {"org/prm": True}
    assert hub.repos["org/prm"] == {"main": {}, "v1": expected(run)}
    assert push(run, "--private", "--revision", "v1") == 0  # the branch exists
    assert [commit["revision"] for commit in hub.commits] == ["v1", "v1"]


def test_files_beside_ours_stay_unless_they_would_be_read_in_their_place(run, hub, capsys):
    hub.repos["org/prm"] = {"main": {"notes.md": b"mine", "README.md": b"old"}}
    hub.private["org/prm"] = False
    assert push(run) == 0
    assert hub.repos["org/prm"]["main"] == expected(run) | {"notes.md": b"mine"}
    hub.repos["org/prm"]["main"] |= {"model-00001-of-00002.safetensors": b"", "a.bin": b""}
    capsys.readouterr()
    assert push(run) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bilevel-prm push: --repo org/prm: holds model-00001-of-00002.safetensors, which this "
        "model lacks and transformers would read with it or in its place; remove them there, or "
        "name another --repo or --revision"
    )
    assert len(hub.commits) == 1
    assert push(run, "--private") == 2
    assert "--private: org/prm exists and is public" in capsys.readouterr().err


def test_an_upload_that_fails_makes_no_commit(run, hub, capsys):
    for place in ("/preupload/", "/commit/"):
        hub.fails_at = place
        assert push(run) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("bilevel-prm push: --repo org/prm: ")
        assert "507" in said
        assert said.endswith("; no commit was made")
    assert hub.commits == []


def test_a_missing_token_is_said_before_anything_is_asked(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert push(run) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bilevel-prm push: no token of the Hugging Face Hub: log in with `hf auth login`, or set "
        "HF_TOKEN"
    )
    assert hub.asked == []


@pytest.mark.parametrize(
    ("damage", "status", "said"),
    [
        (lambda run: (run / "results.json").unlink(), 2, "is not complete (stopped); go on with:"),
        (lambda run: shutil.rmtree(run / "model"), 2, "no model/ to upload"),
        (lambda run: (run / "model" / DIGESTS).unlink(), 2, "model.sha256: is missing"),
        (lambda run: (run / "model" / CARD).unlink(), 2, "README.md: is missing"),
        (lambda run: (run / "model" / "prm.json").write_text("{}"), 1, "prm.json: field format"),
        (lambda run: flip(run / "model" / "model.safetensors"), 2, "found another"),
        (lambda run: flip(run / "weighting" / "params.safetensors"), 1, "found another"),
        (lambda run: unseal(run / "weighting"), 2, "has no digest beside it"),
        (lambda run: shutil.rmtree(run), 2, "expected a run directory"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(run, damage, status, said, capsys):
    damage(run)
    assert push(run, "--dry-run") == status
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("bilevel-prm push: ")
    assert said in told


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def unseal(folder: Path) -> None:
    for path in folder.glob("*.sha256"):
        path.unlink()


@pytest.mark.parametrize("name", ["prm", "a/b/c", "org/-prm", "org/prm..x"])
def test_names_that_no_repository_has_are_refused(run, name, capsys):
    assert main(["push", str(run), "--repo", name, "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"bilevel-prm push: --repo {name}: ")


def test_the_command_takes_its_endpoint_from_the_environment(run, hub):
    given = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "recipes", "push", str(run), "--repo", "org/prm"]
    done = subprocess.run(
        words, env={**os.environ, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].startswith(f"uploaded: {hub.url}/org/prm/commit/")
    assert hub.repos == {"org/prm": {"main": expected(run)}}


def test_the_card_says_what_the_results_say(run):
    results = json.loads((run / "results.json").read_text())
    card = huggingface_hub.ModelCard.load(run / "model" / CARD)
    assert card.data.pipeline_tag == "image-text-to-text"
    mean, (low, high) = results["rows"]["instance_net"], results["ci95"]["instance_net"]
    assert f"| PRM: Instance Net | {mean:.3f} | [{low:.3f}, {high:.3f}] |" in card.text
    data = json.loads((run / "env.json").read_text())["data"]
    assert f"| {data['train_file']['bytes']:,} | `{data['train_file']['sha256']}` |" in card.text
    asked = card.text.split("```json\n")[1].split("\n```")[0]
    assert json.loads(asked) == json.loads((run / "model" / "prm.json").read_text())
