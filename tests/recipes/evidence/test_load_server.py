"""What the load test of the server calls lost, and its quantiles; no server is run."""

from __future__ import annotations

from collections import Counter

from recipes.evidence.load_server import Seen, lost


def name(status: int) -> str:
    return f'requests_total{{status="{status}"}}'


def test_an_answer_that_one_side_alone_counted_is_lost():
    before = {name(200): 5.0, name(429): 1.0}
    after = {name(200): 8.0, name(429): 3.0}
    assert lost(before, after, Seen(Counter({200: 3, 429: 2}))) == 0
    assert lost(before, after, Seen(Counter({200: 2, 429: 2}))) == 1
    assert lost(before, {**after, name(504): 1.0}, Seen(Counter({200: 3, 429: 2}))) == 1
    assert lost(before, after, Seen(Counter({200: 3, 429: 2, 418: 1}))) == 1
    assert lost(before, after, Seen(Counter({200: 3, 429: 2}), broken=2)) == 2


def test_quantiles_are_latencies_that_were_seen():
    seen = Seen(latencies=[0.4, 0.1, 0.3, 0.2])
    assert (seen.quantile(0.5), seen.quantile(0.99)) == (0.3, 0.4)
