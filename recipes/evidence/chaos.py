"""Kill training runs again and again, and compare their results with undisturbed runs.

Tiny training runs of every weighting and every hypergradient are killed with SIGKILL and resumed,
over and over, until they end; then each is compared, bit for bit, with the same run uninterrupted:
model, weights, weighting, answers and every line of the log.

Half of the kills come at a random moment, counted in processor time of the process, so anywhere
from reading the options to the last result. The other half come just before a random change of the
file system within the run directory (a file opened for writing, made, renamed or removed), because
that is where a half-written state would show; many of these are inside the writing of a checkpoint.
The random choices follow from the seed; when a kill meets the process does not, so that the number
of kills differs a little from call to call. ``make chaos`` runs this module.

Every attempt is a process of its own, started by a server process that has imported everything and
trained nothing (``multiprocessing``'s forkserver): a fresh interpreter spends ten times as long on
imports as such a run on all of its steps. It trains on one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from recipes.embedded.tiny import write_tiny
from recipes.evidence.chaos_attempt import attempt
from recipes.run.files import write_json

KILLS, SEED = 50, 0
"""What ``make chaos`` asks for, and what ``results/chaos.json`` holds the figures of."""

SAVE_EVERY = 2
_COMMON = (
    "--steps 8 --batch-size 6 --meta-batch-size 6 --upper-start 1 --freeze vision_tower "
    f"--log-every 1 --save-every {SAVE_EVERY} --no-progress --threads 1 --lower-lr 0.002"
)
CASES = {
    "net": "--weighting net --loss-target pairs",
    "table": "--weighting table --bound clip --upper-optimizer lazy-adam --batch-size 3 "
    "--accumulation 2 --unroll-steps 2 --rollback",
    "domain": "--weighting domain --bound softplus --order lower-first",
    "unrolled": "--weighting table --bound clip --hypergradient unrolled --unroll-steps 2",
    "implicit": "--weighting net --hypergradient implicit --solver-iterations 2 "
    "--lower-weight-decay 0",
    "penalty": "--weighting domain --bound softplus --hypergradient penalty --unroll-steps 2 "
    "--batch-size 3 --accumulation 2",
}
_COMPARED = (
    *("log.jsonl", "weights.jsonl", "test_questions.jsonl"),
    *("model/model.safetensors", "weighting/params.safetensors"),
)


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        killed: Whether our SIGKILL ended it.
        code: Exit status; -9 for the kill.
        cpu: Processor seconds that it took; up to the last look at them if it was killed.
        output: What it printed.
    """

    killed: bool
    code: int
    cpu: float
    output: str


class Harness:
    """Start attempts and kill them.

    Attributes:
        folder: Where data, model and runs are.
    """

    def __init__(self, folder: Path) -> None:
        """Write the task; start nothing."""
        self.folder = folder
        write_tiny(folder / "data", folder / "model")
        # Read by torch when the server imports it, before a process could set its own number.
        os.environ["OMP_NUM_THREADS"] = "1"
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["recipes.evidence.chaos_attempt"])

    def words(self, case: str, run: Path) -> list[str]:
        """The command of a case."""
        data = self.folder / "data"
        files = [f"--{n}-file={data / n}.jsonl" for n in ("train", "meta", "test")]
        chosen = [f"--model={self.folder / 'model'}", f"--output-dir={run}", *files]
        return ["train", *chosen, *_COMMON.split(), *CASES[case].split()]

    def attempt(
        self,
        run: Path,
        words: Sequence[str],
        *,
        cpu: float | None = None,
        event: int | None = None,
    ) -> Ended:
        """Run a command, killed after ``cpu`` seconds of its own or before its ``event``-th change.

        Args:
            run: The directory whose changes count.
            words: The command line.
            cpu: Processor seconds before the kill; None: no such kill.
            event: Number of the change, from 1; None: no such kill.
        """
        file = self.folder / "output.txt"
        file.write_bytes(b"")
        process = self._context.Process(
            target=attempt, args=(list(words), str(run), event, str(file))
        )
        process.start()
        assert process.pid is not None
        spent = 0.0
        while process.is_alive():
            spent = max(spent, _cpu_seconds(process.pid))
            if cpu is not None and spent >= cpu:
                process.kill()  # nothing if it has just ended by itself
                break
            process.join(0.002)
        process.join()
        assert process.exitcode is not None
        output = file.read_text(encoding="utf-8", errors="replace")
        # A process knows its own time exactly; how late we looked depends on who else computes.
        exact = re.search(r"^processor seconds: (\S+)$", output, re.MULTILINE)
        spent = float(exact[1]) if exact else spent
        return Ended(process.exitcode == -signal.SIGKILL, process.exitcode, spent, output)


def _cpu_seconds(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def outcome(run: Path) -> dict[str, Any]:
    """Return all that a finished run wrote, but for how long it took."""
    files: dict[str, Any] = {name: (run / name).read_bytes() for name in _COMPARED}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    del results["seconds"]
    return files | {"results.json": results}


def _position(run: Path) -> tuple[int, int, bool]:
    """Steps logged, steps in the newest checkpoint, and whether one was being written."""
    logged = 0
    if (run / "log.jsonl").is_file():
        text = (run / "log.jsonl").read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        logged = json.loads(lines[-1])["step"] if lines else 0
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    saved = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))]
    return logged, max(saved, default=0), any(name.endswith(".tmp") for name in names)


@dataclass(frozen=True)
class Reference:
    """A case's run without any kill.

    Attributes:
        outcome: What it wrote, see ``outcome``.
        cpu: Processor seconds that it took.
        events: How often it changed the file system.
    """

    outcome: dict[str, Any]
    cpu: float
    events: int


@dataclass(frozen=True)
class Counts:
    """What was observed; counts of several runs add up.

    Attributes:
        kills: Attempts that were killed.
        inside_checkpoint: Those of them that were writing a checkpoint.
        resumed: Those of them after which the run went on from its newest complete checkpoint, or
            from the beginning where there was none yet.
        lost: The most steps that were logged and had to be taken again.
        runs: Runs that came to their end.
        different: Those of them that differ from the run without kills in any bit.
        harmless: Kills in runs that do not differ.
    """

    kills: int = 0
    inside_checkpoint: int = 0
    resumed: int = 0
    lost: int = 0
    runs: int = 0
    different: int = 0
    harmless: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the sums, and the larger of the losses."""
        return Counts(
            self.kills + other.kills,
            self.inside_checkpoint + other.inside_checkpoint,
            self.resumed + other.resumed,
            max(self.lost, other.lost),
            self.runs + other.runs,
            self.different + other.different,
            self.harmless + other.harmless,
        )


def reference_run(harness: Harness, case: str) -> Reference:
    """Run a case once without killing it.

    Raises:
        RuntimeError: It failed; the message ends with its output.
    """
    run = harness.folder / "whole" / case
    ended = harness.attempt(run, harness.words(case, run))
    if ended.code != 0:
        raise RuntimeError(f"{case}: exit status {ended.code}\n{ended.output}")
    return Reference(outcome(run), ended.cpu, int(ended.output.rpartition("changes: ")[2]))


def killed_run(harness: Harness, case: str, reference: Reference, rng: random.Random) -> Counts:
    """Run a case, killed until it happens to end, and compare it with the reference.

    Args:
        harness: Starts the attempts.
        case: A key of ``CASES``.
        reference: The case's run without kills.
        rng: Draws the kills.

    Raises:
        RuntimeError: An attempt failed by itself; the message ends with its output.
    """
    run = harness.folder / "runs" / case
    shutil.rmtree(run, ignore_errors=True)
    counts = Counts()
    expected: int | None = None
    while not (run / "results.json").exists():
        resume = (run / "args.yaml").exists()
        words = ["train", "--resume", str(run)] if resume else harness.words(case, run)
        # Nothing beyond three quarters: what a resumed run has left is shorter, so that its end is
        # reached all the same, and fewer attempts end unkilled.
        share = 0.75 * rng.random()
        if rng.random() < 0.5:
            ended = harness.attempt(run, words, cpu=share * reference.cpu)
        else:
            ended = harness.attempt(run, words, event=1 + int(share * reference.events))
        if ended.code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{' '.join(words)}: exit status {ended.code}\n{ended.output}")
        if expected is not None and _went_on(ended, expected, resume):
            counts += Counts(resumed=1)
        expected = None
        if ended.killed:
            logged, saved, writing = _position(run)
            counts += Counts(kills=1, inside_checkpoint=writing, lost=max(0, logged - saved))
            expected = saved
    if expected is not None:  # killed after the last file
        counts += Counts(resumed=1)
    different = outcome(run) != reference.outcome
    return counts + Counts(runs=1, different=different, harmless=0 if different else counts.kills)


def _went_on(ended: Ended, expected: int, resume: bool) -> bool:
    """Whether an attempt started after ``expected`` steps; one killed before its note counts too.

    The note is the line that a resumed run prints; ``resume``: whether the attempt was one.
    """
    note = re.search(r"resumed after (\d+) of|(from the beginning)", ended.output)
    if note is None:
        return ended.killed or not resume
    return int(note[1] or 0) == expected


def chaos(
    folder: Path, kills: int, seed: int, cases: Sequence[str] = tuple(CASES)
) -> dict[str, Any]:
    """Kill runs in ``folder`` until there were ``kills`` and every case had as many runs.

    Returns:
        The figures that ``results/chaos.json`` holds, but for the command.
    """
    started = time.perf_counter()
    harness, rng = Harness(folder), random.Random(seed)
    references: dict[str, Reference] = {}
    total = Counts()
    while total.kills < kills or total.runs % len(cases):
        case = cases[total.runs % len(cases)]
        if case not in references:
            references[case] = reference_run(harness, case)
        counts = killed_run(harness, case, references[case], rng)
        total += counts
        verdict = "DIFFERENT" if counts.different else "identical"
        print(f"{case}: {counts.kills} kills, {verdict}; {total.kills} in all", flush=True)
    return {
        "kills": total.kills,
        "resumed": total.resumed,
        "identical": total.harmless,
        "lost_steps_max": total.lost,
        "runs": total.runs,
        "runs_identical": total.runs - total.different,
        "inside_checkpoint": total.inside_checkpoint,
        "save_every": SAVE_EVERY,
        "cases": list(cases),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 1 if a run differs from the one without kills, or did not go on from its
        newest checkpoint.
    """
    parser = argparse.ArgumentParser(description="Kill training runs and compare what they become.")
    parser.add_argument("--output", default="results/chaos.json", help="where the figures go")
    parser.add_argument(
        "--kills",
        type=int,
        default=50,
        help="at least so many; then to the end of the round of cases",
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="fixes the kinds and places of the kills"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        figures = chaos(Path(folder), given.kills, given.seed)
    figures["command"] = (
        f"python -m recipes.evidence.chaos --kills {given.kills} --seed {given.seed}"
    )
    write_json(Path(given.output), figures)
    print(json.dumps(figures, indent=1))
    good = figures["identical"] == figures["resumed"] == figures["kills"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
