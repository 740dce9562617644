"""Counts of a server in the text format of Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Metrics:
    """What became of the requests to score.

    Attributes:
        answers: The number of answers by HTTP status.
        seconds: How long all of them took together, from the head of a request to its answer.
        inside: The number of requests that are read, wait or are scored now.
    """

    answers: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    inside: int = 0

    def text(self, *, waiting: int, batches: int, solutions: int, scoring_seconds: float) -> str:
        """Return the page of metrics, with what the scoring thread counts."""
        return "\n".join(
            [
                *_metric("requests_total", "counter", "Answers by HTTP status."),
                *(
                    f'bilevel_prm_requests_total{{status="{status}"}} {count}'
                    for status, count in sorted(self.answers.items())
                ),
                *_metric("request_seconds", "summary", "Time from a request to its answer."),
                f"bilevel_prm_request_seconds_sum {self.seconds:.6f}",
                f"bilevel_prm_request_seconds_count {self.answers.total()}",
                *_metric("requests_inside", "gauge", "Requests that are read, wait or are scored."),
                f"bilevel_prm_requests_inside {self.inside}",
                *_metric("requests_waiting", "gauge", "Requests in the queue of the scorer."),
                f"bilevel_prm_requests_waiting {waiting}",
                *_metric("batches_total", "counter", "Calls of the scorer."),
                f"bilevel_prm_batches_total {batches}",
                *_metric("solutions_total", "counter", "Solutions that were scored."),
                f"bilevel_prm_solutions_total {solutions}",
                *_metric("scoring_seconds_total", "counter", "Time in the scorer."),
                f"bilevel_prm_scoring_seconds_total {scoring_seconds:.6f}",
                "",
            ]
        )


def _metric(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP bilevel_prm_{name} {help}"
    yield f"# TYPE bilevel_prm_{name} {kind}"
