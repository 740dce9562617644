"""verl's async ``compute_score``: one response a call, judged together."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from prm.rewards.verl import process_reward

QUESTION = "what is one plus two"


def gathered(compute_score, *rows):
    async def run():
        return await asyncio.gather(*(compute_score(**row) for row in rows))

    return asyncio.run(run())


def row(solution, **info):
    """The arguments of verl's reward loop."""
    return {
        "data_source": "sheets",
        "solution_str": solution,
        "ground_truth": "3",
        "extra_info": {"question": QUESTION, **info},
        "reward_router_address": None,
        "reward_model_tokenizer": None,
    }


def test_a_score_for_every_response(scorer, picture, monkeypatch):
    compute_score = process_reward(scorer)
    assert inspect.iscoroutinefunction(compute_score)
    solutions = ["one plus two\n\nis three", "two", "one", " ", "is\n\n" + "one two three " * 40]
    images = [None, [picture], None, None, None]
    sizes = []
    judge = scorer.judge

    def counted(questions, solutions, images=None):
        sizes.append(len(questions))
        return judge(questions, solutions, images)

    monkeypatch.setattr(scorer, "judge", counted)
    found = gathered(
        compute_score, *(row(s, images=i) for s, i in zip(solutions, images, strict=True))
    )
    assert sizes == [5]  # in one pass
    judged = judge([QUESTION] * 5, solutions, images)
    for entry, one in zip(found[:3], judged, strict=False):
        steps = len(one.step_scores)
        assert entry == {
            "score": one.score,
            "prm_steps": steps,
            "prm_truncated": 0,
            "prm_judged": 1,
        }
    assert found[3] == {"score": 0, "prm_steps": 0, "prm_truncated": 0, "prm_judged": 0}
    assert found[4] == {
        "score": judged[4].step_scores[0],
        "prm_steps": 2,
        "prm_truncated": 1,
        "prm_judged": 1,
    }


def test_what_comes_meanwhile_is_judged_next(scorer, monkeypatch):
    compute_score = process_reward(scorer)

    async def run():
        first = asyncio.create_task(compute_score(**row("one")))
        await asyncio.sleep(0)
        second = asyncio.create_task(compute_score(**row("two")))
        return await asyncio.gather(first, second)

    found = asyncio.run(run())
    assert [entry["score"] for entry in found] == pytest.approx(
        [one.score for one in scorer.judge([QUESTION] * 2, ["one", "two"])], abs=1e-6
    )
    assert gathered(compute_score, row("one"))[0] == pytest.approx(found[0])  # in another loop


def test_errors_reach_every_caller(scorer, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(scorer, "judge", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        gathered(process_reward(scorer), row("one"), row("two"))


def test_a_row_without_a_question_is_refused(scorer):
    with pytest.raises(ValueError, match=r"the question of the row in extra_info\['problem'\]"):
        gathered(process_reward(scorer, question="problem"), row("one"))
