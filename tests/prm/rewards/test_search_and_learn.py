"""``PRM.score`` as search-and-learn calls it, and its shape."""

from __future__ import annotations

import pytest

from prm.rewards.search_and_learn import SearchAndLearnPRM

OUTPUTS = [["one plus two\n\nis three", "two"], ["three\n\nis\n\nfour"], []]


def test_scores_come_back_in_the_shape_of_the_outputs(scorer):
    questions = ["what is one plus two", "what is four", "what"]
    found = SearchAndLearnPRM(scorer).score(questions, OUTPUTS)
    assert [[len(steps) for steps in several] for several in found] == [[2, 1], [3], []]
    for question, several, scores in zip(questions, OUTPUTS, found, strict=True):
        for output, steps in zip(several, scores, strict=True):
            (alone,) = scorer.score([question], [output.split("\n\n")])
            assert steps == pytest.approx(alone, abs=1e-6)


def test_questions_without_outputs_are_refused(scorer):
    with pytest.raises(ValueError, match="found 1 questions and 3 lists of outputs"):
        SearchAndLearnPRM(scorer).score(["what"], OUTPUTS)
