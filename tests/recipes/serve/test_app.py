"""The application in process: scores, batches, limits, time, overload, closing, metrics."""

from __future__ import annotations

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prm.rewards.scorer import Judgement, Scorer
from prm.schema import DataError
from tests.prm.tiny import internvl, save_image, told

pytest.importorskip("fastapi", reason="the extra serve (fastapi) is not installed")
from fastapi.testclient import TestClient

from recipes.serve.app import Settings, make_app
from recipes.serve.requests import Limits

QUESTION = "what is one plus two"
STEPS = ["one plus two is three", "three plus one is four"]
ABOUT = {"model": "tiny", "aggregation": "min", "threshold": 0.5}


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    prm = internvl(dtype=torch.float32)
    prm.model.config.get_text_config().max_position_embeddings = 120
    return Scorer(told(prm))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return save_image(tmp_path_factory.mktemp("pictures") / "wide.png", 60, 60, seed=1)


class Held:
    """A scorer whose first call waits for ``go``; it keeps what it was asked."""

    def __init__(self, scorer) -> None:
        self.scorer = scorer
        self.calls: list[list[str]] = []
        self.began = threading.Event()
        self.go = threading.Event()

    def judge(self, questions, solutions, images=None):
        self.calls.append([solution[0] for solution in solutions])
        self.began.set()
        assert self.go.wait(60)
        return self.scorer.judge(questions, solutions, images)


def client(scorer, at_once=64, **settings) -> TestClient:
    app = make_app(scorer, Settings(**settings), at_once=at_once, about=ABOUT)
    return TestClient(app, raise_server_exceptions=False)


def score(web, **fields):
    return web.post("/score", json={"question": QUESTION, **fields})


def inside(web, count):
    """Wait until so many requests are inside: they come from threads."""
    service = web.app.state.service
    while service.metrics.inside != count:
        web.get("/health")
    return service


def test_scores_are_the_scorers_bit_for_bit(scorer, picture):
    images = [base64.b64encode(picture.read_bytes()).decode()]
    solutions = [STEPS, STEPS[:1], STEPS[0] + "\n\n" + STEPS[1]]
    expected = scorer.judge([QUESTION] * 3, solutions, [picture] * 3)
    with client(scorer) as web:
        found = score(web, solutions=solutions, images=images).json()["results"]
        (alone,) = scorer.judge([QUESTION], [STEPS])
        single = score(web, steps=STEPS).json()
    for one, there in zip([*expected, alone], [*found, single], strict=True):
        assert isinstance(one, Judgement)
        assert there == {
            "score": one.score,
            "step_scores": list(one.step_scores),
            "steps": one.steps,
            "truncated": False,
        }
    assert len(single["step_scores"]) == 2
    assert single["score"] == min(single["step_scores"])


def test_what_waits_together_is_scored_together(scorer):
    """One call for the three that wait behind the first, whole requests up to four solutions."""
    held = Held(scorer)
    with client(held, at_once=4) as web, ThreadPoolExecutor(5) as threads:
        first = threads.submit(score, web, steps=["one"])
        assert held.began.wait(60)
        rest = []
        for count, solutions in enumerate((["two"], ["three"] * 2, ["four"] * 2), start=2):
            rest.append(threads.submit(score, web, solutions=solutions))
            service = inside(web, count)
            while service.batcher.waiting != count - 1:
                pass
        held.go.set()
        first.result()
        found = [each.result().json()["results"] for each in rest]
    assert held.calls == [["one"], ["two", "three", "three"], ["four", "four"]]
    expected = scorer.score([QUESTION] * 3, [["two"], ["three"], ["three"]])
    assert [one["step_scores"] for answer in found[:2] for one in answer] == expected
    assert service.batcher.batches == 3
    assert service.batcher.solutions == 6


def test_a_solution_that_cannot_be_judged_spoils_no_other(scorer):
    long = ["one plus two " * 50]
    with client(scorer) as web:
        found = score(web, solutions=["", STEPS, long, ["one", " "], "one <|im_end|>"])
        assert found.status_code == 200
        results = found.json()["results"]
        assert results[1]["step_scores"] == scorer.score([QUESTION], [STEPS])[0]
        errors = [results[row]["error"] for row in (0, 2, 3, 4)]
        fields = ["solutions[0]", "solutions[2]", "solutions[3][1]", "solutions[4]"]
        assert [error["field"] for error in errors] == fields
        blank = "field solutions[0]: expected a text that is not blank, found a blank one"
        assert errors[0]["message"] == blank
        assert "at most 120 tokens" in errors[1]["message"]
        assert "--" not in errors[1]["message"]
        alone = score(web, steps=long)
        assert alone.status_code == 422
        assert alone.json()["error"]["field"] == "steps"


def test_a_picture_that_is_cut_off_spoils_only_its_own_request(scorer, picture):
    held = Held(scorer)
    cut = base64.b64encode(picture.read_bytes()[:-3_000]).decode()
    with client(held) as web, ThreadPoolExecutor(3) as threads:
        first = threads.submit(score, web, steps=["one"])
        assert held.began.wait(60)
        bad = threads.submit(score, web, steps=STEPS, images=[cut])
        good = threads.submit(score, web, steps=STEPS)
        while inside(web, 3).batcher.waiting != 2:
            pass
        held.go.set()
        assert first.result().status_code == good.result().status_code == 200
        answer = bad.result()
        assert answer.status_code == 422
        assert answer.json()["error"]["field"] == "images[0]"
        assert good.result().json()["step_scores"] == scorer.score([QUESTION], [STEPS])[0]


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), DataError(expected="numbers", found="nan")]
)
def test_a_fault_of_the_model_is_no_fault_of_the_client(scorer, error):
    class Faulty:
        def judge(self, *lists):
            if lists[0] == ["fault"]:
                raise error
            return scorer.judge(*lists)

    with client(Faulty()) as web:
        body = {"question": "fault", "steps": STEPS}
        assert web.post("/score", json=body).status_code == 500
        assert score(web, steps=STEPS).status_code == 200
        assert web.app.state.service.metrics.answers == {500: 1, 200: 1}


def test_more_requests_than_may_wait_are_told_to_come_again(scorer):
    held = Held(scorer)
    with client(held, most_requests=2) as web, ThreadPoolExecutor(2) as threads:
        taken = [threads.submit(score, web, steps=["one"]) for _ in range(2)]
        service = inside(web, 2)
        refused = [score(web, steps=STEPS) for _ in range(3)]
        held.go.set()
        assert [each.result().status_code for each in taken] == [200, 200]
        assert score(web, steps=STEPS).status_code == 200
    assert [answer.status_code for answer in refused] == [429] * 3
    assert refused[0].headers["retry-after"] == "1"
    assert service.metrics.answers == {200: 3, 429: 3}
    assert service.metrics.inside == 0


def test_what_takes_too_long_is_answered_and_dropped(scorer):
    held = Held(scorer)
    with client(held, seconds=0.5) as web, ThreadPoolExecutor(2) as threads:
        first = threads.submit(score, web, steps=["one"])
        assert held.began.wait(60)
        late = score(web, steps=["two"])
        assert first.result().status_code == late.status_code == 504
        assert "not scored within 0.5 s" in late.json()["error"]["message"]
        held.go.set()
        web.app.state.service.settings = Settings()
        assert score(web, steps=["three"]).status_code == 200
    assert held.calls == [["one"], ["three"]]


def test_a_closing_server_answers_what_is_inside(scorer):
    held = Held(scorer)
    with client(held) as web, ThreadPoolExecutor(1) as threads:
        taken = threads.submit(score, web, steps=["one"])
        assert held.began.wait(60)
        service = web.app.state.service
        service.close()
        while web.get("/health").status_code == 200:
            pass
        late = score(web, steps=STEPS)
        held.go.set()
        assert taken.result().status_code == 200
    assert late.status_code == 503
    assert taken.result().headers["connection"] == late.headers["connection"] == "close"
    assert web.app.state.service.batcher.is_alive is False


def test_a_closing_server_gives_up_after_its_grace(scorer):
    held = Held(scorer)
    with client(held, grace=0.0) as web, ThreadPoolExecutor(1) as threads:
        taken = threads.submit(score, web, steps=["one"])
        assert held.began.wait(60)
        web.app.state.service.close()
        assert taken.result().status_code == 503
        held.go.set()


def test_a_token_is_wanted_where_there_is_one(scorer):
    with client(scorer, token="secret") as web:
        for shown in (None, "secret", "Bearer Secret", "Bearer secret", "Bearer \xe9"):
            headers = {} if shown is None else {"Authorization": shown.encode("latin-1")}
            body = {"question": QUESTION, "steps": STEPS}
            found = web.post("/score", json=body, headers=headers)
            assert found.status_code == (200 if shown == "Bearer secret" else 401)
        assert web.get("/metrics").status_code == 401
        shown = {"Authorization": "Bearer secret"}
        assert 'requests_total{status="401"} 4' in web.get("/metrics", headers=shown).text
        assert web.get("/health").status_code == 200


def test_large_and_foreign_bodies_are_refused_before_they_are_parsed(scorer, monkeypatch):
    parsed = []
    monkeypatch.setattr("recipes.serve.app.read_request", lambda *_: parsed.append(1))
    with client(scorer, limits=Limits(body=100)) as web:
        body = json.dumps({"question": "q" * 100, "steps": STEPS})
        kind = {"Content-Type": "application/json"}
        assert web.post("/score", content=body, headers=kind).status_code == 413
        chunked = web.post("/score", content=iter([body.encode()] * 2), headers=kind)
        assert chunked.status_code == 413
        # A page of another origin can send no other type without being asked for leave.
        foreign = web.post("/score", content="{}", headers={"Content-Type": "text/plain"})
        assert foreign.status_code == 415
        assert parsed == []


def test_errors_say_what_is_wrong_with_which_field(scorer):
    with client(scorer) as web:
        assert score(web, steps="one").json() == {
            "error": {
                "field": "steps",
                "message": "field steps: expected a list of steps, found the string 'one'",
            }
        }
        broken = web.post("/score", content=b"{", headers={"Content-Type": "application/json"})
        assert broken.status_code == 400
        assert broken.json()["error"]["field"] is None
        assert web.get("/score").status_code == 405
        assert web.post("/nothing").status_code == 404


def test_health_and_metrics_tell_what_was_done(scorer):
    with client(scorer) as web:
        assert web.get("/health").json() == {"status": "ok", **ABOUT}
        score(web, solutions=[STEPS, STEPS[:1]])
        score(web, steps=3)
        lines = web.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['bilevel_prm_requests_total{status="200"}'] == "1"
    assert values['bilevel_prm_requests_total{status="422"}'] == "1"
    assert values["bilevel_prm_request_seconds_count"] == "2"
    assert values["bilevel_prm_batches_total"] == "1"
    assert values["bilevel_prm_solutions_total"] == "2"
    assert float(values["bilevel_prm_scoring_seconds_total"]) > 0
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {name.split("{")[0].removesuffix("_sum").removesuffix("_count") for name in values} == (
        names
    )


def test_the_schema_has_the_limits_and_every_answer(scorer):
    with client(scorer, limits=Limits(steps=7, candidates=5)) as web:
        schema = web.get("/openapi.json").json()["paths"]["/score"]["post"]
    fields = schema["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert set(fields) == {"question", "images", "solution", "steps", "solutions"}
    assert fields["steps"]["maxItems"] == 7
    assert fields["solutions"]["maxItems"] == 5
    assert {"200", "400", "401", "413", "415", "422", "429", "503", "504"} <= set(
        schema["responses"]
    )
