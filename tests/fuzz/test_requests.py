"""Requests to the server, changed as the files of the other tests: scores, or an answer in 4xx.

Ten thousand in ``make fuzz``. Body and headers come from strangers; nothing may end in 5xx.
"""

from __future__ import annotations

import base64
import random

import pytest
import torch

from prm.rewards.scorer import Scorer
from tests.fuzz.bulk import changed, damaged_bytes
from tests.fuzz.strategies import dumps
from tests.fuzz.trial import EXAMPLES, SUITE, attempt
from tests.prm.tiny import internvl, save_image, told

pytest.importorskip("fastapi", reason="the extra serve (fastapi) is not installed")
from fastapi.testclient import TestClient

from recipes.serve.app import Settings, make_app
from recipes.serve.requests import Limits

PATHS = ("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "//host/a.png", "~")
TYPES = ("application/json",) * 9 + ("text/plain", "", "application/json; charset=x", "é")


def bodies(rng: random.Random, picture: bytes) -> bytes:
    """A request of one of the three forms, changed in its values, its text or its bytes."""
    if rng.random() < 0.2:
        picture = damaged_bytes(rng, picture)
    shown = base64.b64encode(picture).decode()
    if rng.random() < 0.1:
        shown = rng.choice(PATHS)
    form = rng.choice(
        (
            {"solution": "one plus two\n\nis three"},
            {"steps": ["one plus two", "is three"]},
            {"solutions": ["one", ["two", "three"], "four\n\nfive"]},
        )
    )
    images = {"images": [shown] * rng.choice((1, 1, 2))} if rng.random() < 0.5 else {}
    record = {"question": "what is one plus two", **images, **form}
    if rng.random() < 0.9:
        record = changed(rng, record)
    content = dumps(record).encode("utf-8", "surrogatepass")
    return damaged_bytes(rng, content) if rng.random() < 0.2 else content


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on damaged tags
def test_requests(tmp_path):
    prm = internvl(dtype=torch.float32)
    prm.model.config.get_text_config().max_position_embeddings = 300
    limits = Limits(body=100_000, candidates=60, steps=60, characters=20_000, images=3)
    app = make_app(Scorer(told(prm)), Settings(limits=limits), at_once=64, about={})
    picture = save_image(tmp_path / "a.png", 70, 50).read_bytes()
    start = random.SystemRandom().randrange(2**60) if EXAMPLES else 0
    tries = EXAMPLES or SUITE
    statuses: set[int] = set()
    # An error of the program is raised here, with the generator's number in the traceback.
    with TestClient(app) as web:
        for seed in range(start, start + tries):
            rng = random.Random(seed)
            content = bodies(rng, picture)
            headers = {"Content-Type": rng.choice(TYPES).encode("latin-1")}

            def ask(content=content, headers=headers, seed=seed):
                answer = web.post("/score", content=content, headers=headers)
                assert answer.status_code == 200 or 400 <= answer.status_code < 500, seed
                if answer.status_code != 200:
                    raise Answered(answer.json()["error"]["message"])
                return answer

            found = attempt("requests", ask, (Answered,))
            statuses.add(400 if isinstance(found, Answered) else found.status_code)
            if not isinstance(found, Answered):
                results = found.json().get("results", [found.json()])
                assert all("error" in one or 0 <= one["score"] <= 1 for one in results)
    assert statuses == {200, 400}, "both happen"
    counts = app.state.service.metrics.answers
    assert counts.total() == tries
    assert {200, 400, 415, 422} <= set(counts)


class Answered(Exception):
    """The server refused."""
