"""``bilevel-prm push``: upload model, weighting and card of a complete run to the Hugging Face Hub.

The repository gets the files of ``model/`` at its root, so that its name loads like the folder, and
those of ``weighting/`` in a folder of that name, in one commit. Files that are there beside them
stay, as with every upload; what transformers would read in place of ours is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prm.conventions import FILE, read_conventions
from prm.digests import check_digest
from prm.models.weight_files import DIGESTS, unchanged, weight_files
from recipes.evaluation.card import CARD
from recipes.options.rules import check_together
from recipes.options.use import PushOptions
from recipes.options.values import OptionError, blaming
from recipes.run.errors import RunError
from recipes.run.show import run_state
from recipes.terminal import say

_READ_FIRST = re.compile(
    r"model[\w.-]*\.safetensors|model\.safetensors\.index\.json|adapter_config\.json"
)
"""Files at the root that transformers reads, whatever else is there."""


def run_push(options: PushOptions) -> None:
    """Check a run, say what is uploaded, and upload it unless it is a dry run.

    Raises:
        OptionError: The run is not complete or not as it was sealed, there is no token, or the
            repository cannot take it.
        DataError: The conventions or the weighting are not.
        RunError: The Hub refuses, or cannot be reached. Nothing is visible there of a commit that
            was not completed.
    """
    check_together(options)
    check_repo(options.repo)
    directory = Path(options.directory)
    files = files_of(directory)
    where = options.repo if options.revision is None else f"{options.repo} ({options.revision})"
    for name, path in files.items():
        say(f"{path.stat().st_size:>15,}  {name}")
    total = sum(path.stat().st_size for path in files.values())
    say(f"{total:>15,}  bytes in {len(files)} files for {where}")
    if options.dry_run:
        say("dry run: nothing was uploaded")
        return
    say(f"uploaded: {_uploaded(options, files)}")


def check_repo(name: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        OptionError: It is not written ``org/name``, or the Hub allows no such name.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # is public

    with blaming(f"--repo {name}"):
        if name.count("/") != 1:
            raise ValueError("expected a repository with its owner, written org/name")
        validate_repo_id(name)


def files_of(directory: Path) -> dict[str, Path]:
    """Return the files to upload by their names in the repository, compared with their digests.

    Raises:
        OptionError: The run is not complete, a part of it is missing or has no digest, or a weight
            file or the tokenizer is not as it was written.
        DataError: The conventions or the weighting are not.
    """
    state = run_state(directory)
    if state.state != "complete":
        remedy = "wait for its end" if state.resume is None else f"go on with: {state.resume}"
        raise OptionError(f"{directory}: the run is not complete ({state.state}); {remedy}")
    model, weighting = directory / "model", directory / "weighting"
    if not model.is_dir():
        raise OptionError(
            f"{directory}: no model/ to upload; a run with --lora-save adapter has only adapters, "
            "which peft's push_to_hub uploads"
        )
    for name, made in ((DIGESTS, ""), (FILE, ""), (CARD, " (since runs have cards); write one")):
        if not (model / name).is_file():
            raise OptionError(
                f"{model / name}: is missing; `train` and `cold-start` write it with the "
                f"model{made}"
            )
    with blaming(str(directory)), unchanged(model, weight_files(model)):
        pass
    read_conventions(model / FILE)
    files = {path.name: path for path in sorted(model.iterdir()) if path.is_file()}
    if weighting.is_dir():
        inside = sorted(path for path in weighting.iterdir() if path.is_file())
        for path in inside:
            if path.suffix != ".sha256" and not check_digest(path):
                raise OptionError(f"{path}: has no digest beside it, so that it is not sealed")
        files |= {f"weighting/{path.name}": path for path in inside}
    return {name: path for name, path in files.items() if not path.name.startswith(".")}


def _uploaded(options: PushOptions, files: Mapping[str, Path]) -> str:
    """Upload files in one commit, and return its address.

    Raises:
        OptionError: There is no token, or the repository cannot take them.
        RunError: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = get_token()
    if token is None:
        raise OptionError(
            "no token of the Hugging Face Hub: log in with `hf auth login`, or set HF_TOKEN"
        )
    try:
        api = HfApi(token=token)
        _prepared(api, options, files)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            for name, path in files.items()
        ]
        message = f"Upload the process reward model of {Path(options.directory).name}"
        commit = api.create_commit(
            options.repo, operations, commit_message=message, revision=options.revision
        )
    except OptionError:
        raise
    except Exception as error:  # Those of the client and of the network have no common class.
        told = [" ".join(str(one).split()) for one in (error, error.__cause__) if one is not None]
        raise RunError(f"--repo {options.repo}: {': '.join(told)}; no commit was made") from error
    return str(commit.commit_url)


def _prepared(api: Any, options: PushOptions, files: Mapping[str, Path]) -> None:
    """Create the repository and the branch, unless they exist and can take the files.

    Raises:
        OptionError: They cannot.
    """
    if not api.repo_exists(options.repo):
        api.create_repo(options.repo, private=options.private or None)  # or as its owner has it
    elif options.private and not api.repo_info(options.repo).private:
        raise OptionError(
            f"--private: {options.repo} exists and is public; make it private on the Hub first, "
            "or leave the option out"
        )
    if options.revision is not None:
        api.create_branch(options.repo, branch=options.revision, exist_ok=True)
    there = api.list_repo_files(options.repo, revision=options.revision)
    others = [name for name in there if name not in files and _READ_FIRST.fullmatch(name)]
    if others:
        raise OptionError(
            f"--repo {options.repo}: holds {', '.join(sorted(others))}, which this model lacks and "
            "transformers would read with it or in its place; remove them there, or name another "
            "--repo or --revision"
        )
