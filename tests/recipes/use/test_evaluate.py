"""``evaluate`` with scores that are there, with a dev set, and with options that do nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recipes.use.evaluate
from prm.data.reader import read_examples
from prm.data.splitter import solution_steps
from recipes import commands
from recipes.embedded.vocabulary import SYSTEM_PROMPT
from recipes.options.use import EvaluateOptions, ScoreOptions
from recipes.use.score import run_score


@pytest.fixture(scope="module")
def scores(task, tmp_path_factory):
    """Scores files of dev and test."""
    folder = tmp_path_factory.mktemp("scores")

    def score(name: str) -> str:
        options = ScoreOptions(
            model=str(task.model),
            file=str(task.data / f"{name}.jsonl"),
            output=str(folder / f"{name}.jsonl"),
            system_prompt=SYSTEM_PROMPT,
        )
        return str(run_score(options))

    return {name: score(name) for name in ("dev", "test")}


@pytest.fixture
def evaluate(task, tmp_path):
    def run(**given) -> dict:
        output = tmp_path / "out.json"
        given = {"file": str(task.data / "test.jsonl"), "output": str(output)} | given
        given["overwrite"] = True
        assert commands.run("evaluate", EvaluateOptions(**given)) == 0
        return json.loads(output.read_text())

    return run


def test_scores_that_are_there_give_the_same_figures(task, evaluate, scores, monkeypatch):
    dev = str(task.data / "dev.jsonl")
    asked = {"model": str(task.model), "system_prompt": SYSTEM_PROMPT}
    computed = evaluate(**asked, dev=dev)
    assert computed["dev"]["file"] == dev
    monkeypatch.setattr(recipes.use.evaluate, "load_model", None)  # no model is needed now
    read = evaluate(scores=scores["test"], dev=dev, dev_scores=scores["dev"])
    assert read == computed
    plain = evaluate(scores=scores["test"])
    assert (plain["dev"], plain["aggregation"], plain["threshold"]) == (None, "mean", 0.5)


def test_the_test_set_does_not_choose(task, evaluate, scores, tmp_path):
    asked = {"dev": str(task.data / "dev.jsonl"), "dev_scores": scores["dev"]}
    turned = tmp_path / "turned.jsonl"
    lines = [json.loads(line) for line in Path(scores["test"]).read_text().splitlines()]
    for line in lines:
        line["step_scores"] = [1 - score for score in line["step_scores"]]
    turned.write_text("".join(json.dumps(line) + "\n" for line in lines))
    as_is, other = (evaluate(scores=path, **asked) for path in (scores["test"], str(turned)))
    assert as_is["rows"] != other["rows"]
    for name in ("aggregation", "threshold", "dev"):
        assert as_is[name] == other[name]


def test_a_baseline_is_compared_on_the_same_questions(evaluate, scores):
    found = evaluate(scores=scores["test"], baseline_scores=scores["test"])
    assert found["rows"]["baseline"] == found["rows"]["prm"]
    entry = found["difference"]["baseline"]
    assert (entry["difference"], entry["better"], entry["mcnemar_p"]) == (0.0, 0, 1.0)


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"dev_scores": "{dev}"}, 2, "--dev-scores has no effect without --dev"),
        ({"dev": "{data}/dev.jsonl", "aggregation": "min"}, 2, "--aggregation: no effect with --d"),
        ({"dev": "{data}/dev.jsonl", "threshold": 0.25}, 2, "--threshold: no effect with --dev"),
        ({"context": "gold"}, 2, "--context: no effect with --scores"),
        ({"model": "x", "probability": "vocabulary"}, 2, "--model, --probability: no effect"),
        ({"threshold": 1.5}, 2, "--threshold: expected a number in [0, 1], found 1.5"),
        ({"scores": "{dev}"}, 1, "expected scores of the 20 solutions of"),
        ({"file": "./none.jsonl"}, 2, "./none.jsonl: no such file"),
        ({"scores": "./none.jsonl"}, 2, "none.jsonl: no such file; write the file with"),
        ({"file": "{data}/train.jsonl"}, 1, "expected scores of the"),
    ],
)
def test_what_cannot_be_is_refused(task, scores, capsys, given, status, message):
    words = {**scores, "data": task.data}
    given = {k: v.format(**words) if isinstance(v, str) else v for k, v in given.items()}
    base = {"file": str(task.data / "test.jsonl"), "scores": scores["test"]}
    assert commands.run("evaluate", EvaluateOptions(**{**base, **given})) == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_scores_of_changed_solutions_are_refused(task, scores, tmp_path, capsys):
    lines = Path(scores["test"]).read_text().splitlines()
    first = json.loads(lines[0])
    first["step_scores"] = first["step_scores"][:-1]
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    options = EvaluateOptions(file=str(task.data / "test.jsonl"), scores=str(cut))
    assert commands.run("evaluate", options) == 1
    assert "one per step, found 4; score this file again" in capsys.readouterr().err


PROCESS_BENCH = [
    {"id": "gsm8k-0", "generator": "m", "problem": "1+1?", "steps": ["1+1=2", "So 3"],
     "final_answer_correct": False, "label": 1},
    {"id": "gsm8k-1", "generator": "m", "problem": "2+2?", "steps": ["2+2=4", "So 4"],
     "final_answer_correct": True, "label": -1},
    {"id": "math-0", "generator": "m", "problem": "1-1?", "steps": ["1-1=1", "So 1"],
     "final_answer_correct": False, "label": 0},
    {"id": "math-1", "generator": "m", "problem": "2-2?", "steps": ["2-2=0"],
     "final_answer_correct": True, "label": -1},
    {"id": "math-2", "generator": "m", "problem": "3-2?", "steps": ["3-2=1"],
     "final_answer_correct": True, "label": -1},
]  # fmt: skip
VISUAL_PROCESS_BENCH = [
    {"image": [], "question": "1+1?", "answer": "2", "policy_model": "m", "data_source": "A",
     "response": {"steps": ["a", "b", "c"], "process_correctness": [1, -1, 1]}},
    {"image": [], "question": "2+1?", "answer": "3", "policy_model": "m", "data_source": "B",
     "response": {"steps": ["a", "b", "c"], "process_correctness": [1, 0, -1]}},
]  # fmt: skip


@pytest.fixture
def judge(tmp_path, capsys):
    """Evaluate rows with given step scores, and return figures and what was printed."""

    def run(rows, step_scores, **given):
        file, scored, output = (tmp_path / f"{name}.jsonl" for name in ("rows", "scores", "out"))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        examples = read_examples(file)
        lines = [
            {"id": example.id, "step_scores": scores, "scores": {"mean": 0.5}}
            for example, scores in zip(examples, step_scores, strict=True)
        ]
        scored.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = {"file": str(file), "scores": str(scored), "output": str(output)}
        options |= {"overwrite": True} | given
        status = commands.run("evaluate", EvaluateOptions(**options))
        said = capsys.readouterr()
        return (json.loads(output.read_text()) if status == 0 else None), said.out + said.err

    return run


def test_process_bench_is_evaluated_as_it_is_published(judge):
    scores = [[0.9, 0.2], [0.9, 0.9], [0.9, 0.2], [0.9], [0.4]]
    found, said = judge(PROCESS_BENCH, scores)
    # gsm8k: both found. math: the error is found one step late, one of two right ones is accepted.
    bench = found["steps"]["process_bench"]
    assert bench["per_domain"]["gsm8k"]["f1"] == 1.0
    assert bench["per_domain"]["math"] == {
        "f1": 0.0, "accuracy_erroneous": 0.0, "accuracy_correct": 0.5, "erroneous": 1, "correct": 2
    }  # fmt: skip
    assert bench["mean_f1"] == 0.5
    assert found["rows"] == found["difference"] == {}
    assert "no row has both group and correct: figures of steps, no selection" in said
    assert "math: F1 0.000, accuracy 0.000 on 1 erroneous and 0.500 on 2 correct" in said
    assert "VisualProcessBench" not in said  # there are no labels behind an error
    # The threshold is that of the option, or of the dev file, and never of --file.
    strict, _ = judge(PROCESS_BENCH, scores, threshold=0.95)
    assert strict["steps"]["process_bench"]["per_domain"]["gsm8k"]["accuracy_correct"] == 0.0


def test_process_bench_of_one_kind_of_solution_has_an_accuracy_and_a_reason(judge):
    scores = [[0.9, 0.2], [0.9, 0.9], [0.9, 0.2], [0.9], [0.4]]
    pairs = list(zip(PROCESS_BENCH, scores, strict=True))
    wrong = [(row, values) for row, values in pairs if row["label"] >= 0]
    fine = [(row, values) for row, values in pairs if row["label"] < 0]
    found, said = judge(*map(list, zip(*wrong, strict=True)))
    assert found["steps"]["process_bench"] is None
    assert found["steps"]["process_bench_of_one_kind"]["math"] == {
        "kind": "erroneous", "solutions": 1, "accuracy": 0.0
    }  # fmt: skip
    assert "ProcessBench, math: no F1, as there is no correct solution; accuracy 0.000 on 1" in said
    assert "VisualProcessBench" not in said
    found, said = judge(*map(list, zip(*fine, strict=True)))
    assert found["steps"]["process_bench_of_one_kind"]["math"] == {
        "kind": "correct", "solutions": 2, "accuracy": 0.5
    }  # fmt: skip
    assert "math: no F1, as there is no erroneous solution; accuracy 0.500 on 2 correct sol" in said
    assert "steps: no AUC and no macro F1: all" in said


def test_visual_process_bench_is_evaluated_as_it_is_published(judge):
    found, said = judge(VISUAL_PROCESS_BENCH, [[0.9, 0.9, 0.8], [0.2, 0.1, 0.3]])
    # Of five labelled steps: right ones .9 .8 .2, wrong ones .9 .3; the neutral one is left out.
    f1_right, f1_wrong = 2 * 2 / (2 * 2 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 1)
    bench = found["steps"]["visual_process_bench"]
    assert bench["macro_f1"] == pytest.approx((f1_right + f1_wrong) / 2, abs=1e-4)
    # A: 2 hits, 1 miss; no wrong one found. B: the wrong one is found, the right one missed.
    in_a, in_b = (2 * 2 / (2 * 2 + 1) + 0) / 2, (0 + 2 * 1 / (2 * 1 + 1)) / 2
    assert bench["per_domain"] == pytest.approx({"A": in_a, "B": in_b}, abs=1e-4)
    assert "VisualProcessBench macro F1: 0.583 over all steps (A 0.400, B 0.333)" in said


def test_a_dev_file_of_steps_chooses_the_threshold(judge, tmp_path):
    dev, dev_scores = tmp_path / "dev.jsonl", tmp_path / "dev_scores.jsonl"
    rows = [{**row, "id": f"dev-{n}", "problem": f"{n}?"} for n, row in enumerate(PROCESS_BENCH)]
    dev.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        {"id": row["id"], "step_scores": [0.7, 0.6][: len(row["steps"])], "scores": {"mean": 0.5}}
        for row in rows
    ]
    dev_scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = [[0.9, 0.2], [0.9, 0.9], [0.9, 0.2], [0.9], [0.4]]
    found, _ = judge(PROCESS_BENCH, scores, dev=str(dev), dev_scores=str(dev_scores))
    # Right: four .7 and .6. Wrong: .6 and .7. Between them four are right and one is wrong.
    assert found["threshold"] == pytest.approx(0.65)
    assert found["dev"]["step_macro_f1"] == pytest.approx((8 / 10 + 2 / 4) / 2)
    assert (found["aggregation"], found["dev"]["accuracy"]) == ("mean", {})


@pytest.mark.parametrize(
    "given", [{"tie": "first"}, {"equal_answers": "math-verify"}, {"baseline_scores": "x.jsonl"}]
)
def test_options_on_a_selection_are_refused_where_there_is_none(judge, given):
    found, said = judge(PROCESS_BENCH, [[0.9, 0.2], [0.9, 0.9], [0.9, 0.2], [0.9], [0.4]], **given)
    assert found is None
    assert f"--{next(iter(given)).replace('_', '-')}: no effect: no row of" in said


BOXED = {
    "id": "q",
    "question": "What is 2+3?",
    "candidates": [
        "2+3 is 5.\n\nSo \\boxed{5}", "We get $\\boxed{5}$.", "Thus \\boxed{5}.",
        "2+3 is 7.\n\nAnswer: 7", "It is 7.\n\nAnswer: 7",
    ],
    "true_false": [True, True, True, False, False],
}  # fmt: skip


def steps_of(row):
    return [[0.5] * len(solution_steps(text)) for text in row["candidates"]]


def test_boxed_answers_vote(judge):
    found, said = judge([BOXED], steps_of(BOXED))
    assert found["rows"]["self_consistency"] == 1.0
    assert found["n_without_answer"] == 0
    assert "no answer" not in said


def test_nothing_is_claimed_over_an_empty_vote(judge):
    row = BOXED | {"candidates": ["a", "b c", "d e", "f g", "h i"]}
    row["candidates"][0] = "a b"
    found, said = judge([row], steps_of(row))
    assert "self_consistency" not in found["rows"]
    assert found["difference"] == {}
    assert "5 of 5 candidates have no answer, and no vote; there is no majority" in said
    assert "majority)" not in said
    assert "McNemar" not in said


def test_it_says_that_no_question_is_mixed(judge):
    row = BOXED | {"true_false": [True] * 5}
    found, said = judge([row], steps_of(row))
    assert found["rows"] == {"pass@1": 1.0}
    assert "no question is mixed: the candidates of each are all right or all wrong" in said
    assert "best-of-N accuracy" not in said


def test_it_says_that_one_answer_is_right_and_wrong_and_that_groups_are_spelt_alike(judge):
    rows = [
        {"id": f"{group}{n}", "question": "How many?", "steps": [{"text": "x"}], "group": group,
         "answer": "12 cm" if n else "12", "correct": n > 0}
        for group in ("g", "g ") for n in range(2)
    ]  # fmt: skip
    found, said = judge(rows, [[0.5]] * 4)
    assert (found["n_contradictory_questions"], found["n_groups_alike"]) == (2, 1)
    assert "2 of 2 questions have one answer that is right in one candidate and wrong" in said
    assert "1 of 2 groups are another one but for case, white space or Unicode form" in said


def test_letters_up_to_ten_options_vote_together(judge):
    texts = ["Option I", "(I)", "I. 12 cm", "A", "(A)"]
    rows = [
        {"id": str(n), "question": "Which?", "steps": [{"text": "x"}], "group": "g", "answer": text,
         "correct": n < 3}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    found, _ = judge(rows, [[0.5]] * 5)
    assert found["rows"]["self_consistency"] == 1.0


def test_answers_that_are_equal_by_algebra_vote_together_if_asked(judge):
    texts = ["2\\sqrt{8}", "4\\sqrt{2}", "7", "7", "\\sqrt{32}"]
    rows = [
        {"id": str(n), "question": "?", "steps": [{"text": "x"}], "group": "g", "answer": text,
         "correct": text != "7"}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    found, _ = judge(rows, [[0.5]] * 5)
    assert found["rows"]["self_consistency"] == 0.0
    found, _ = judge(rows, [[0.5]] * 5, equal_answers="math-verify")
    assert found["rows"]["self_consistency"] == 1.0


def changed_test(task, tmp_path, **fields) -> Path:
    """The test file with other fields in its first row."""
    lines = (task.data / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["images"] = [str(task.data / name) for name in row["images"]]
    path = tmp_path / "changed.jsonl"
    rows[0] |= fields
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_scores_of_rows_that_evaluate_alone_leaves_out_are_left_out(task, evaluate, tmp_path):
    """A row without outcome can be scored, and not be evaluated."""
    path = changed_test(task, tmp_path, correct=None)
    scores = tmp_path / "scores.jsonl"
    options = {
        "file": str(path),
        "on_bad_row": "skip",
        "system_prompt": SYSTEM_PROMPT,
        "image_root": str(task.data),
    }
    run_score(ScoreOptions(model=str(task.model), output=str(scores), **options))
    rows = len(path.read_text(encoding="utf-8").splitlines())
    assert len(scores.read_text(encoding="utf-8").splitlines()) == rows
    read = evaluate(
        file=str(path), scores=str(scores), on_bad_row="skip", image_root=str(task.data)
    )
    assert read == evaluate(model=str(task.model), **options)


def test_scores_of_another_file_are_noted(task, evaluate, scores, tmp_path, capsys):
    evaluate(scores=scores["test"])
    assert "was made from another file" not in capsys.readouterr().err
    changed = str(changed_test(task, tmp_path, answer="other"))
    evaluate(file=changed, scores=scores["test"], image_root=str(task.data))
    assert "was made from another file" in capsys.readouterr().err
