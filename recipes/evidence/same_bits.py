"""Whether two commits compute the same bits: ``python -m recipes.evidence.same_bits OLD NEW``.

Both commits run the same commands, each from its own checkout: the embedded data, the cold start,
``train-net``, ``train-table``, ``train-domain``, a short run of every hypergradient, every route
and every kind of training, a run that is resumed from a checkpoint, and a run that the old commit
started and the new one resumes. Then every file that a run leaves is compared: models, weights,
checkpoints and options byte for byte, logs and results value for value, apart from times.

Everything runs on one thread, since the order of sums over several threads is not fixed. Results of
a commit are kept in ``--folder`` and used again by the next call; ``--short`` leaves out the three
long runs. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.run.errors import reported

_LOWER = (
    "--dev-file none --test-file none --steps 12 --batch-size 8 --log-every 1 --no-progress "
    "--threads 1"
)
_UPPER = "--upper-start 2 --meta-batch-size 12"
_TABLE = f"--config train-table {_UPPER}"
_DOT = "--batch-size 1 --accumulation 4 --normalise table --route dot"
_WINDOW = f"{_TABLE} --order upper-first"  # The default; only one-step reads the order.
_IMPLICIT = "--hypergradient implicit --lower-weight-decay 0 --solver-iterations 3 --damping 1"
SHORT_RUNS = {
    "baseline": "--config baseline",
    "net": f"--config train-net {_UPPER}",
    "domain": f"--config train-domain {_UPPER}",
    "upper-first": f"{_TABLE} --order upper-first",
    "sgd": f"{_TABLE} --upper-optimizer sgd --upper-betas 0.9 0.999",
    "clipped": f"{_TABLE} --lower-max-norm 0.01 --upper-max-norm 0.01",
    "accumulated": f"{_TABLE} --batch-size 4 --accumulation 2 --unroll-steps 2 --rollback",
    "vocabulary": f"{_TABLE} --probability vocabulary --context gold --aggregation min "
    "--loss-target both",
    "dot": f"{_TABLE} {_DOT} --order lower-first",
    "dot-upper-first": f"{_TABLE} {_DOT} --order upper-first",
    "ghost": f"{_TABLE} --route ghost --order upper-first",
    "per-example": f"{_TABLE} --route per-example",
    "jvp": f"{_TABLE} --route jvp",
    "reverse": f"{_TABLE} --route reverse",
    "central-difference": f"{_TABLE} --route central-difference",
    "unrolled": f"{_WINDOW} --hypergradient unrolled --unroll-steps 3",
    "unrolled-rollback": f"{_WINDOW} --hypergradient unrolled --unroll-steps 2 --rollback "
    "--accumulation 2",
    "nystrom": f"{_WINDOW} {_IMPLICIT} --linear-solver nystrom",
    "cg": f"{_WINDOW} {_IMPLICIT} --linear-solver cg",
    "neumann": f"{_WINDOW} {_IMPLICIT} --linear-solver neumann",
    "penalty": f"{_WINDOW} --hypergradient penalty --unroll-steps 2",
    "saved": f"--config train-net {_UPPER} --save-every 4 --keep-checkpoints 0",
}
"""The options of each short run, in addition to those that all share."""

LONG_RUNS = ("train-net", "train-table", "train-domain")
_SAVED = "runs/short-saved"
_TIMES = {"seconds", "seconds_per_step", "time"}


def short_words(name: str) -> list[str]:
    """Return the command of a short run."""
    return ["train", *f"{_LOWER} {SHORT_RUNS[name]} --output-dir runs/short-{name}".split()]


def compute(checkout: Path, folder: Path, *, short: bool) -> None:
    """Run every command whose result is not in ``folder`` yet.

    Args:
        checkout: The code to run.
        folder: The working directory of the commands.
        short: Whether to leave out the long runs.

    Raises:
        RuntimeError: A command failed; the message ends with the end of its output.
    """
    run = _runner(checkout, folder)
    run("data/embedded", ["data", "embedded", "--out", "data/embedded"])
    cold = "cold-start --config cold-start --no-progress --threads 1"
    run("runs/cold-start", cold.split())
    for name in SHORT_RUNS:
        run(f"runs/short-{name}", short_words(name))
    run("runs/resumed", ["train", "--resume", "runs/resumed/checkpoints/step-4"], _SAVED)
    for name in () if short else LONG_RUNS:
        run(f"runs/{name}", f"train --config {name} --no-progress --threads 1".split())


def _runner(checkout: Path, folder: Path) -> Callable[..., None]:
    """Return a function that runs a command once and moves its output to the final name."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}

    def run(output: str, words: Sequence[str], copy_of: str | None = None) -> None:
        complete = folder / f"{output.replace('/', '-')}.complete"
        if complete.exists():
            return
        target = folder / output
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy_of is not None:
            copy_unfinished(folder / copy_of, target)
        print(f"{checkout.name}: {output}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "recipes", *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"{checkout}: {' '.join(words)} ended with status {done.returncode}:\n"
                + done.stdout[-2000:]
            )
        complete.touch()

    return run


def copy_unfinished(source: Path, target: Path) -> None:
    """Copy a complete run as if it had ended before its results were written."""
    shutil.copytree(source, target)
    (target / "results.json").unlink()
    arguments = (target / "args.yaml").read_text(encoding="utf-8")
    arguments = arguments.replace(f"runs/{source.name}", f"runs/{target.name}")
    (target / "args.yaml").write_text(arguments, encoding="utf-8")


def differences(old: Path, new: Path) -> Iterator[str]:
    """Yield a line for every file of two folders that differs or that one of them lacks."""
    names = sorted({str(p.relative_to(root)) for root in (old, new) for p in _files(root)})
    for name in names:
        left, right = old / name, new / name
        if not left.exists() or not right.exists():
            yield f"{name}: only in {'the new' if right.exists() else 'the old'} commit's folder"
        elif left.read_bytes() != right.read_bytes() and _values(left) != _values(right):
            yield f"{name}: differs"


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name not in ("env.json", "lock", "lock.json"):
            yield path


def _values(path: Path) -> Any:
    """Return the content of a file without times."""
    text = path.read_bytes()
    if path.suffix == ".json":
        return _timeless(json.loads(text))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in text.splitlines()]
    return text


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in _TIMES}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def checkout_of(commit: str, folder: Path) -> tuple[str, Path]:
    """Return the full name of a commit and a checkout of it in ``folder``."""
    name = _git("rev-parse", "--verify", f"{commit}^{{commit}}")
    path = folder / "code" / name[:12]
    if not path.exists():
        path.mkdir(parents=True)
        root = _git("rev-parse", "--show-toplevel")  # In a subfolder, git would archive only that.
        archive = subprocess.Popen(["git", "archive", name], stdout=subprocess.PIPE, cwd=root)
        subprocess.run(["tar", "-x", "-C", str(path)], stdin=archive.stdout, check=True)
        if archive.wait():
            raise RuntimeError(f"git archive {name} failed")
    return name, path


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute the runs of both commits, compare them, and print the differences."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.same_bits", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("old", help="commit")
    parser.add_argument("new", help="commit")
    parser.add_argument("--folder", default="runs/same-bits", help="what is computed is kept here")
    parser.add_argument("--short", action="store_true", help="without the three long runs")
    given = parser.parse_args(arguments)
    folder = Path(given.folder).resolve()
    sides = []
    for commit in (given.old, given.new):
        name, checkout = checkout_of(commit, folder)
        work = folder / "work" / name[:12]
        work.mkdir(parents=True, exist_ok=True)
        compute(checkout, work, short=given.short)
        sides.append((checkout, work))
    (_, old), (checkout, new) = sides
    crossed = new / "runs" / "crossed"
    if old != new and not crossed.exists():
        copy_unfinished(old / _SAVED, crossed)
        resume = ["train", "--resume", "runs/crossed/checkpoints/step-4"]
        subprocess.run(
            [sys.executable, "-m", "recipes", *resume],
            cwd=new,
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            check=True,
        )
    lines = list(differences(old / "data", new / "data"))
    runs = ["cold-start", *(f"short-{name}" for name in SHORT_RUNS), "resumed"]
    runs += [] if given.short else LONG_RUNS
    for run in runs:
        lines += [f"{run}/{line}" for line in differences(old / "runs" / run, new / "runs" / run)]
    print("\n".join(lines) if lines else f"{len(runs)} runs: no file differs")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.same_bits", main))
