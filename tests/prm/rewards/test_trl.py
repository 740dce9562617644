"""Reward functions as TRL calls them: values, columns, what is logged; and a step of TRL itself."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from PIL import Image

from prm.rewards.trl import async_grpo_reward, grpo_reward

QUESTION = "what is one plus two"
SOLUTIONS = ["one plus two\n\nis three", "two\n\none", "one"]


def said(text, role="assistant"):
    return [{"role": role, "content": text}]


def called(reward, prompts, completions, **columns):
    """As ``GRPOTrainer._calculate_rewards`` of TRL 1.16 calls it."""
    logged: dict = {}
    more = {"completion_ids": [[1]] * len(prompts), "trainer_state": None, **columns}
    more |= {"log_extra": logged.__setitem__, "log_metric": logged.__setitem__}
    found = reward(prompts=prompts, completions=completions, **more)
    return (asyncio.run(found) if inspect.isawaitable(found) else found), logged


@pytest.fixture
def expected(scorer):
    return [min(steps) for steps in scorer.score([QUESTION] * 3, SOLUTIONS)]


@pytest.mark.parametrize("make", [grpo_reward, async_grpo_reward])
def test_rewards_are_the_scores_of_the_completions(scorer, expected, make):
    reward = make(scorer)
    assert inspect.iscoroutinefunction(reward) == (make is async_grpo_reward)
    assert reward.__name__ == "process_reward"
    plain, logged = called(reward, [QUESTION] * 3, SOLUTIONS)
    assert plain == expected
    assert logged == {
        "process_reward/unjudged": 0,
        "process_reward/truncated": 0,
        "prm_truncated": [False] * 3,
    }
    prompts = [said("reply in words", "system") + said(QUESTION, "user")] * 3
    chats, _ = called(reward, prompts, [said(text) for text in SOLUTIONS])
    assert chats == expected


def test_questions_and_pictures_come_from_columns_that_are_named(scorer, picture, expected):
    prompts = ["reply in words: what is one plus two"] * 3
    found, _ = called(grpo_reward(scorer, question="bare"), prompts, SOLUTIONS, bare=[QUESTION] * 3)
    assert found == expected
    with Image.open(picture) as image:
        image.load()
    shown = [image, [image], None]
    by_column, _ = called(
        grpo_reward(scorer, images="sheet"), [QUESTION] * 3, SOLUTIONS, sheet=shown
    )
    usual, _ = called(grpo_reward(scorer), [QUESTION] * 3, SOLUTIONS, image=shown)
    steps = scorer.score([QUESTION] * 3, SOLUTIONS, [picture, picture, None])
    assert by_column == usual == [min(one) for one in steps]
    assert usual[:2] != expected[:2]
    parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inside, _ = called(grpo_reward(scorer), [said(parts, "user")] * 3, SOLUTIONS)
    # Up to rounding: other solutions of the question share the pass.
    assert inside[:2] == pytest.approx(usual[:2], abs=1e-6)


def test_a_column_that_is_missing_is_named(scorer):
    with pytest.raises(ValueError, match=r"a column 'bare' in the data set, found 'x'$"):
        called(grpo_reward(scorer, question="bare"), [QUESTION], ["one"], x=[1])


def test_completions_that_cannot_be_judged_have_no_reward(scorer):
    long = "is\n\n" + "one two three " * 40
    completions = ["one", " \n", "two <|im_end|>", long]
    with pytest.warns(UserWarning, match=r"1 of 4 completions have no reward: example 'solutions"):
        found, logged = called(grpo_reward(scorer), [QUESTION] * 4, completions)
    assert found[1:3] == [0.0, None]
    (first,) = scorer.score([QUESTION], ["is"])
    assert found[3] == pytest.approx(first[0], abs=1e-6)
    assert logged == {
        "process_reward/unjudged": 0.25,
        "process_reward/truncated": 0.25,
        "prm_truncated": [False, False, False, True],
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about TRL
def test_a_policy_is_trained_by_it(scorer, tmp_path):
    """Two steps of GRPO on a tiny policy; prompts and completions are what TRL makes of them."""
    trl = pytest.importorskip("trl", reason="TRL is no dependency")
    from datasets import Dataset

    from tests.prm.tiny import qwen, qwen2_tokenizer

    policy = qwen(qwen2_tokenizer()).model.float().requires_grad_(True)
    calls: list = []
    reward = grpo_reward(scorer)

    def kept(**columns):
        texts = [completion[0]["content"] for completion in columns["completions"]]
        calls.append((texts, reward(**columns)))
        return calls[-1][1]

    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    data = Dataset.from_list([{"prompt": said(QUESTION, "user")}] * 4)
    trainer = trl.GRPOTrainer(
        policy,
        reward_funcs=[kept, async_grpo_reward(scorer)],
        args=args,
        train_dataset=data,
        processing_class=qwen2_tokenizer(),
    )
    trainer.train()
    assert len(calls) == 2
    for texts, rewards in calls:
        for text, found in zip(texts, rewards, strict=True):
            (judged,) = scorer.judge([QUESTION], [text])
            expected = getattr(judged, "score", None if text.strip() else 0.0)
            assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))
    logs = trainer.state.log_history
    assert any("rewards/process_reward/mean" in entry for entry in logs)
