"""``score`` as reward_hub has it, and as its_hub calls it."""

from __future__ import annotations

import asyncio
import inspect
import math
from enum import Enum
from types import SimpleNamespace

import pytest

from prm.rewards.reward_hub import ItsHubPRM, RewardHubPRM
from prm.schema import DataError

QUESTION = "what is one plus two"
SOLUTION = "one plus two\n\n\n\nis three\n\nthree"
STEPS = ["one plus two", "is three", "three"]


def chat(solution, question=QUESTION):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]


class Method(Enum):
    """As ``reward_hub.base.AggregationMethod``."""

    PRODUCT = "prod"


def test_scores_are_aggregated_as_reward_hub_names_it(scorer):
    prm = RewardHubPRM(scorer)
    (steps,) = scorer.score([QUESTION], [STEPS])
    chats = [chat(SOLUTION), chat("two", "what is two")]
    by = {"last": steps[-1], "min": min(steps), "prod": math.prod(steps), "model": min(steps)}
    for method, expected in by.items():
        found = prm.score(chats, aggregation_method=method)
        assert found[0] == pytest.approx(expected, abs=1e-6)
        assert len(found) == 2
    assert prm.score(chat(SOLUTION)) == [pytest.approx(steps[-1], abs=1e-6)]
    assert prm.score(chats, "\n\n", Method.PRODUCT) == prm.score(chats, aggregation_method="prod")
    with pytest.raises(ValueError, match="expected aggregation_method model, prod, min, last, f"):
        prm.score(chats, aggregation_method="mean")


def test_the_signature_is_the_one_that_was_recorded():
    """Of ``HuggingFaceProcessRewardModel.score`` in reward-hub 0.1.10."""
    names = list(inspect.signature(RewardHubPRM.score).parameters)[1:]
    assert names == [
        *("messages", "step_separator", "aggregation_method"),
        *("return_full_prm_result", "max_input_tokens"),
    ]


def test_the_full_result_has_the_names_of_the_librarys(scorer):
    (result,) = RewardHubPRM(scorer).score(
        chat(SOLUTION), aggregation_method="min", return_full_prm_result=True
    )
    steps = result.step_scores
    assert steps == pytest.approx(scorer.score([QUESTION], [STEPS])[0], abs=1e-6)
    assert (result.product, result.min, result.last) == (math.prod(steps), min(steps), steps[-1])
    assert result.score == result.min


def test_its_hub_gets_a_score_for_each_response(scorer, picture):
    prm = ItsHubPRM(scorer)
    expected = [min(s) for s in scorer.score([QUESTION] * 2, [STEPS, STEPS[:1]])]
    found = prm.score(QUESTION, [SOLUTION, STEPS[0]])
    assert found == pytest.approx(expected, abs=1e-6)
    assert prm.score(QUESTION, SOLUTION) == pytest.approx(expected[0], abs=1e-6)
    assert asyncio.run(prm.ascore(QUESTION, [SOLUTION, STEPS[0]])) == found
    message = SimpleNamespace(role="user", content=QUESTION)
    messages = SimpleNamespace(to_chat_messages=lambda: [message])
    assert prm.score(messages, SOLUTION) == prm.score([message], SOLUTION) == found[0]
    seen = ItsHubPRM(scorer, images=picture).score(QUESTION, SOLUTION)
    (alone,) = scorer.score([QUESTION], [STEPS], [picture])
    assert seen == pytest.approx(min(alone), abs=1e-6) != found[0]


def test_a_blank_response_is_refused(scorer):
    with pytest.raises(DataError, match="expected at least one step"):
        RewardHubPRM(scorer).score(chat(" \n\n "))
