"""Kill training runs repeatedly, and compare their results with those of uninterrupted runs.

Tiny training runs of every weighting and every hypergradient are killed with SIGKILL and resumed
until they end. Each is then compared, bit for bit, with the same run without kills: model, weights,
weighting, answers and every line of the log.

Half of the kills come after a random amount of the process's processor time, at any point between
reading the options and the last result. The other half come just before a random change of the file
system in the run directory (a file is opened for writing, created, renamed or removed), since a
partly written state would show there; many of these are inside the writing of a checkpoint. The
seed determines the random choices but not the exact moment at which a kill takes effect, so the
number of kills varies slightly between calls. ``make chaos`` runs this module.

Every attempt is a process of its own. A server process that has imported everything and trained
nothing forks it (``multiprocessing``'s forkserver), since a new interpreter needs ten times as long
for imports as such a run for all of its steps. It trains on one thread.
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
from recipes.run.errors import reported
from recipes.run.files import check_writable, write_json

KILLS, SEED = 50, 0
"""The setting of ``make chaos`` and of the figures in ``results/chaos.json``."""

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
    """The end of an attempt.

    Attributes:
        killed: Whether the harness's SIGKILL ended it.
        code: The exit status, which is -9 for the kill.
        cpu: The processor seconds that it used, up to the last poll if it was killed.
        output: The text that it printed.
    """

    killed: bool
    code: int
    cpu: float
    output: str


class Harness:
    """Starts attempts and kills them.

    Attributes:
        folder: The folder of data, model and runs.
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
        """Return the command of a case."""
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
            run: The directory whose changes are counted.
            words: The command line.
            cpu: The processor seconds before the kill. None means no such kill.
            event: The number of the change, from 1. None means no such kill.
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
                process.kill()  # It has no effect if the process has just ended.
                break
            process.join(0.002)
        process.join()
        assert process.exitcode is not None
        output = file.read_text(encoding="utf-8", errors="replace")
        # The process reports its time exactly; the delay of a poll depends on the machine's load.
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
    """Return everything that a finished run wrote, except times."""
    files: dict[str, Any] = {name: (run / name).read_bytes() for name in _COMPARED}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    del results["seconds"]
    return files | {"results.json": results}


def _position(run: Path) -> tuple[int, int, bool]:
    """Return the steps in the log and the newest checkpoint, and whether one was being written."""
    logged = 0
    if (run / "log.jsonl").is_file():
        text = (run / "log.jsonl").read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        logged = json.loads(lines[-1])["step"] if lines else 0
    names = [path.name for path in (run / "checkpoints").glob("*step-*")]
    saved = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))]
    return logged, max(saved, default=0), any(name.endswith(".unfinished") for name in names)


@dataclass(frozen=True)
class Reference:
    """A case's run without kills.

    Attributes:
        outcome: Everything that it wrote, as the function ``outcome`` returns it.
        cpu: The processor seconds that it used.
        events: The number of its changes of the file system.
    """

    outcome: dict[str, Any]
    cpu: float
    events: int


@dataclass(frozen=True)
class Counts:
    """The observed counts, which can be added over runs.

    Attributes:
        kills: The number of killed attempts.
        inside_checkpoint: The number of kills during the writing of a checkpoint.
        resumed: The number of kills after which the run resumed from its newest complete
            checkpoint, or from the beginning if there was none.
        lost: The largest number of logged steps that had to be repeated.
        runs: The number of runs that ended.
        different: The number of these that differ from the run without kills in any bit.
        harmless: The number of kills in runs that do not differ.
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
        RuntimeError: The run failed; the message ends with its output.
    """
    run = harness.folder / "whole" / case
    ended = harness.attempt(run, harness.words(case, run))
    if ended.code != 0:
        raise RuntimeError(f"{case}: exit status {ended.code}\n{ended.output}")
    return Reference(outcome(run), ended.cpu, int(ended.output.rpartition("changes: ")[2]))


def killed_run(harness: Harness, case: str, reference: Reference, rng: random.Random) -> Counts:
    """Run a case, with kills until an attempt ends by itself, and compare it with the reference.

    Args:
        harness: The harness that starts the attempts.
        case: A key of ``CASES``.
        reference: The case's run without kills.
        rng: The generator of the kills.

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
        # Kills are within the first three quarters. A resumed run is shorter, so kills still reach
        # its end, and fewer attempts end without a kill.
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
    if expected is not None:  # The kill came after the last file.
        counts += Counts(resumed=1)
    different = outcome(run) != reference.outcome
    return counts + Counts(runs=1, different=different, harmless=0 if different else counts.kills)


def _went_on(ended: Ended, expected: int, resume: bool) -> bool:
    """Return whether an attempt started after ``expected`` steps.

    This is read from the line that a resumed run prints. An attempt that was killed before that
    line counts, too. ``resume`` states whether the attempt was a resumed run.
    """
    note = re.search(r"resumed after (\d+) of|(from the beginning)", ended.output)
    if note is None:
        return ended.killed or not resume
    return int(note[1] or 0) == expected


def chaos(
    folder: Path, kills: int, seed: int, cases: Sequence[str] = tuple(CASES)
) -> dict[str, Any]:
    """Kill runs in ``folder`` until there are ``kills`` kills and equally many runs of every case.

    Returns:
        The figures of ``results/chaos.json``, without the command.
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
        The exit status, which is 1 if a run differs from the one without kills, or did not resume
        from its newest checkpoint.
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
    check_writable("--output", Path(given.output))
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
    sys.exit(reported("recipes.evidence.chaos", main))
