"""``bilevel-prm serve`` under load: rate, latency, what overload does, and the end by a signal.

Run by ``python -m recipes.evidence.load_server``.

The server is a process of its own, with the embedded model. Clients are threads of this process
with a connection each; every one sends the next request (a question with its picture, and one
candidate) when the last is answered. Latency is wall time as a client sees it, from sending to the
decoded answer. After a round the counts of ``/metrics`` are compared with those of the clients: an
answer that is in one of them alone was lost. Overload is more clients than ``--max-requests``; at
last SIGTERM comes while clients ask.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prm.conventions import Conventions
from prm.data.reader import read_jsonl
from prm.data_urls import read_bytes
from prm.models.model import load_prm, save_prm
from recipes.embedded.build import Sizes, build
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.models.loading import EMBEDDED_BASE
from recipes.run.errors import RunError, reported
from recipes.run.files import check_writable, write_json
from recipes.run.provenance import environment, machine

_HEADERS = {"Content-Type": "application/json"}


@dataclass
class Seen:
    """What the clients of a round have seen.

    Attributes:
        statuses: Their answers by HTTP status.
        latencies: Seconds of every request that got scores.
        refused: Requests that found nobody listening, and so were never taken.
        broken: Requests that were sent and got no answer.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    broken: int = 0

    def quantile(self, share: float) -> float:
        """Return the latency that this share of the requests does not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def bodies(folder: Path) -> list[bytes]:
    """Write the embedded model and some questions; return a request for every candidate."""
    build(folder / "data", seed=0, sizes=Sizes(9, 1, 1, 3, 2, 1, 16, 8))
    prm = load_prm(EMBEDDED_BASE)
    usage = Conventions(plus_id=prm.plus_id, minus_id=prm.minus_id, system_prompt=SYSTEM_PROMPT)
    save_prm(replace(prm, conventions=replace(usage, max_patches=6)), {}, folder / "model")
    return [
        json.dumps(
            {
                "question": row.question,
                "steps": [step.text for step in row.steps],
                "images": [base64.b64encode(read_bytes(path)).decode() for path in row.images],
            }
        ).encode()
        for row in read_jsonl(folder / "data" / "test.jsonl")
    ]


@contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run ``bilevel-prm serve``, and yield its process and its port.

    Raises:
        RunError: It does not start.
    """
    words = [sys.executable, "-m", "recipes", "serve", "--model", str(model), "--port", "0"]
    process = subprocess.Popen([*words, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if ": serving " not in line:
            raise RunError(f"the server did not start: {line!r}")
        yield process, int(line.split(": serving ")[0].rsplit(":", 1)[1])
    finally:
        process.kill()
        process.wait()


def ask(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Seen:
    """Have so many clients ask for so long; each waits for an answer before it asks again.

    A client whose connection breaks, or that is told that the server closes, asks no more.
    """
    seen = Seen()
    lock = threading.Lock()
    ends = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        row = number
        while time.perf_counter() < ends:
            started = time.perf_counter()
            try:
                connection.request("POST", "/score", requests[row % len(requests)], _HEADERS)
                answer = connection.getresponse()
                json.loads(answer.read())
            except ConnectionRefusedError:
                with lock:
                    seen.refused += 1
                return
            except (OSError, http.client.HTTPException):
                with lock:
                    seen.broken += 1
                return
            took = time.perf_counter() - started
            with lock:
                seen.statuses[answer.status] += 1
                if answer.status == 200:
                    seen.latencies.append(took)
            if answer.status == 503:
                return
            row += clients
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def counted(port: int) -> dict[str, float]:
    """Return what ``/metrics`` says, by the name of the metric."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("bilevel_prm_"): float(value) for name, value in pairs}


def lost(before: dict[str, float], after: dict[str, float], seen: Seen) -> int:
    """Return by how many answers the counts of the server and of the clients differ."""
    difference = seen.broken
    for status in {200, 422, 429, 500, 503, 504, *seen.statuses}:
        name = f'requests_total{{status="{status}"}}'
        counts = after.get(name, 0) - before.get(name, 0)
        difference += abs(int(counts) - seen.statuses[status])
    return difference


def round_of(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Return what a round of so many clients came to."""
    before, started = counted(port), time.perf_counter()
    seen = ask(port, requests, clients, seconds)
    took = time.perf_counter() - started
    after = counted(port)
    batches = after["batches_total"] - before["batches_total"]
    scored = after["solutions_total"] - before["solutions_total"]
    return {
        "clients": clients,
        "solutions_per_second": seen.statuses[200] / took,
        "p50_ms": seen.quantile(0.5) * 1000,
        "p99_ms": seen.quantile(0.99) * 1000,
        "solutions_per_batch": scored / batches,
        "answers": {str(status): count for status, count in sorted(seen.statuses.items())},
        "lost": lost(before, after, seen),
    }


def ended(model: Path, requests: Sequence[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Return what becomes of requests when SIGTERM comes in the middle of a round."""
    with server(model) as (process, port):
        ask(port, requests, clients, min(3.0, seconds))  # Warms up.
        timer = threading.Timer(seconds / 2, process.send_signal, (signal.SIGTERM,))
        timer.start()
        seen = ask(port, requests, clients, seconds)
        status = process.wait(120)
    return {
        "clients": clients,
        "answers": {str(number): count for number, count in sorted(seen.statuses.items())},
        "found_nobody_listening": seen.refused,
        "sent_without_an_answer": seen.broken,
        "exit_status": status,
    }


def measure(clients: Sequence[int], seconds: float, at_most: int, many: int) -> dict[str, Any]:
    """Return all rounds, the overload and the end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = bodies(folder)
        with server(folder / "model") as (_, port):
            ask(port, requests, max(clients), min(3.0, seconds))  # Warms up.
            rounds = [round_of(port, requests, count, seconds) for count in clients]
        with server(folder / "model", "--max-requests", str(at_most)) as (_, port):
            overload = round_of(port, requests, many, seconds)
        end = ended(folder / "model", requests, max(clients), seconds)
    return {
        "seconds_per_round": seconds,
        "request_bytes": sum(map(len, requests)) / len(requests),
        "rounds": rounds,
        "overload": {"max_requests": at_most, **overload},
        "sigterm": end,
        "machine": machine(),
        "environment": environment(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the figures, write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evidence.load_server", description=__doc__
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20.0, help="of every round")
    parser.add_argument("--at-most", type=int, default=8, help="--max-requests under overload")
    parser.add_argument("--many", type=int, default=64, help="clients under overload")
    parser.add_argument("--note", help="what else the machine did, kept in the file")
    parser.add_argument("--output", default="results/serve.json", help="JSON file")
    given = parser.parse_args(arguments)
    check_writable("--output", Path(given.output))
    found = measure(given.clients, given.seconds, given.at_most, given.many)
    for row in (*found["rounds"], found["overload"]):
        print(
            f"{row['clients']:>4} clients {row['solutions_per_second']:>8.1f} solutions/s, p50 "
            f"{row['p50_ms']:.0f} ms, p99 {row['p99_ms']:.0f} ms, "
            f"{row['solutions_per_batch']:.1f} a batch; answers {row['answers']}, "
            f"{row['lost']} lost"
        )
    print(f"SIGTERM: {found['sigterm']}")
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m recipes.evidence.load_server", *words])
    write_json(Path(given.output), found | {"note": given.note, "command": command})


if __name__ == "__main__":
    sys.exit(reported("recipes.evidence.load_server", main))
