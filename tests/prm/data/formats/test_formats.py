"""Every data format: what its records become, and how each mistake is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from prm.data.formats.table import FORMATS
from prm.data.reader import Row, iter_rows, read_examples
from prm.data_urls import embedded
from prm.names import FORMAT_NAMES
from prm.schema import DataError, Step, StepExample
from tests.prm.data.formats.good_records import GOOD, SYSTEM, completions, gpt, human


def write(folder: Path, *records, array=False) -> Path:
    path = folder / "data.json"
    text = json.dumps(records) if array else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, *records, **more) -> list[StepExample]:
    return [e for row in iter_rows(write(folder, *records), **more) for e in row.examples]


def first_error(folder: Path, record, **more) -> DataError:
    error = next(iter(iter_rows(write(folder, record), **more)))
    assert isinstance(error, DataError)
    assert (error.file, error.line) == (folder / "data.json", 1)
    return error


def labels(example: StepExample) -> list[float | None]:
    return [step.label for step in example.steps]


def texts(example: StepExample) -> list[str]:
    return [step.text for step in example.steps]


def test_every_format_has_a_record_here():
    assert tuple(GOOD) == FORMAT_NAMES


@pytest.mark.parametrize("first", GOOD)
def test_a_row_of_another_format_than_the_first_row_is_told_so(tmp_path, first):
    others = [name for name in GOOD if name != first]
    rows = list(iter_rows(write(tmp_path, GOOD[first], *(GOOD[name] for name in others))))
    assert rows[0].format == first
    for line, (row, name) in enumerate(zip(rows[1:], others, strict=True), start=2):
        assert isinstance(row, DataError)
        assert row.line == line
        assert row.remedy.startswith(f"line 1 has the format {first} (")
        assert f", and this row looks like {name} (" in row.remedy
        assert row.remedy.endswith("write each format to a file of its own")


def test_a_row_of_another_format_than_the_named_one_is_told_so(tmp_path):
    error = first_error(tmp_path, GOOD["stepwise"], format="prm-jsonl")
    assert (error.field, error.found) == ("id", "nothing")
    assert error.remedy.startswith(
        "--format names the format prm-jsonl (id, question, steps: [{text, label}]), and this row "
        "looks like stepwise (prompt, completions, labels); "
    )


def test_a_row_of_no_format_keeps_its_error_and_names_the_row_that_set_the_format(tmp_path):
    lacking = {key: value for key, value in GOOD["stepwise"].items() if key != "completions"}
    lacking["completion"] = []
    path = write(tmp_path, {"a": 1}, GOOD["stepwise"], lacking)
    *_, error = iter_rows(path)
    assert (error.line, error.field, error.found) == (3, "completions", "nothing")
    assert error.remedy == (
        "rename 'completion' to 'completions'; "
        "line 2 has the format stepwise (prompt, completions, labels)"
    )


def test_every_name_has_its_reader_in_the_order_of_the_names():
    assert tuple(format.name for format in FORMATS) == FORMAT_NAMES


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("name", GOOD)
def test_a_format_is_told_by_its_first_record(tmp_path, name, array):
    assert [format.name for format in FORMATS if format.matches(GOOD[name])] == [name]
    path = write(tmp_path, GOOD[name], GOOD[name], array=array)
    rows = list(iter_rows(path))
    assert [row.line for row in rows] == [1, 2]
    assert {row.format for row in rows} == {name}
    (again, _) = iter_rows(path, format=name)
    assert again.examples == rows[0].examples
    for example in rows[0].examples:
        assert example.question.strip() == example.question
        assert example.images in ((tmp_path / "x.png",), ())


def test_own_records(tmp_path):
    (example,) = read(tmp_path, GOOD["prm-jsonl"])
    assert labels(example) == [1.0, 3 / 8, None]


def test_visualprm(tmp_path):
    (example,) = read(tmp_path, GOOD["visualprm"])
    assert example == StepExample(
        "7", "What is x?", (tmp_path / "x.png",), (Step("x = 4. Then", 1.0), Step("so", 0.0)),
        domain="geo", extra={"source": [1]},
    )  # fmt: skip
    (two,) = read(tmp_path, GOOD["visualprm"] | {"image": ["x.png", "y.png"]})
    assert two.images == (tmp_path / "x.png", tmp_path / "y.png")
    (none,) = read(tmp_path, {**GOOD["visualprm"], "image": None})
    assert none.images == ()
    # Marks that are not as many as the images stay in the text, to be counted.
    assert two.question == none.question == "<image>\nWhat is x?"
    assert texts(two) == texts(example)


def test_question_and_first_step_in_turns_of_their_own(tmp_path):
    turns = [human("### Question:\nWhat is x?"), human("s"), gpt("+\n")]
    (example,) = read(tmp_path, {"id": 1, "conversations": turns})
    assert (example.question, texts(example), labels(example)) == ("What is x?", ["s"], [1.0])
    (plain,) = read(tmp_path, {"id": 1, "conversations": [human("What?"), *turns[1:]]})
    assert plain.question == "What?"


def test_rows_that_visualprm_gives_no_id_get_one_each(tmp_path):
    row = GOOD["visualprm"] | {"id": -1}
    other = copy.deepcopy(row)
    other["conversations"][1]["value"] += " there"
    first, second, third = read(tmp_path, row, row, other)
    assert [e.id.split("-")[0] for e in (first, second, third)] == ["row#1", "row#2", "row#3"]
    # The same text has the same hash, another text another.
    assert first.id.split("-")[1] == second.id.split("-")[1] != third.id.split("-")[1]
    assert len(read_examples(write(tmp_path, {**row, "image": None}, {**row, "image": None}))) == 2


def test_meta_rows_have_outcomes_and_no_labels(tmp_path):
    turns = [SYSTEM, human("### Question:\nq"), human("s"), gpt("+"), human("Answer: B"), gpt("+")]
    row = {"id": "m", "response": "r", "true_false": False, "conversations": turns}
    row |= {"image": "../data/meta_images/x.png"}
    first, second = read(tmp_path, row, row)
    assert (first.group, first.correct, first.answer) == ("m", False, "B")
    assert labels(first) == [None, None]
    assert first.id.startswith("m#1-")
    assert first.id != second.id
    assert first.extra == {"response": "r"}
    one = row | {"conversations": [human("q"), human("D"), gpt("+")]}
    assert read(tmp_path, one)[0].answer == "D"


@pytest.mark.parametrize(
    ("image", "folder", "root", "found"),
    [
        # Train rows: relative to the root. Meta rows: as published, the first dot cut off by the
        # code that reads them; from the folder of the file they are right as they stand.
        ("data/x.png", "repo/data", "repo", "repo/data/x.png"),
        ("../data/x.png", "repo/data", "repo", "repo/data/x.png"),
        ("../data/x.png", "repo/data", None, "repo/data/../data/x.png"),
        ("../../x.png", "repo/data", "repo", "repo/x.png"),
    ],
)
def test_both_conventions_of_image_paths(tmp_path, image, folder, root, found):
    (tmp_path / folder).mkdir(parents=True)
    row = {"id": 1, "image": image, "conversations": [human("q"), human("s"), gpt("+")]}
    (example,) = read(tmp_path / folder, row, image_root=None if root is None else tmp_path / root)
    assert example.images == (tmp_path / found,)


def test_raw_rollouts(tmp_path):
    (example,) = read(tmp_path, GOOD["visualprm-raw"])
    assert labels(example) == [0.75, 0.0, None]
    assert texts(example) == ["s", "t", "u"]
    assert example.question == "q"
    assert example.extra == {"source_answer": "4", "trials": [16, 16, 0]}
    plain = {"question": "q", "steps_with_score": [{"step": "s", "score": 0.5}], "id": "k"}
    (example,) = read(tmp_path, plain)
    assert (example.id, labels(example), example.extra) == ("k", [0.5], {})


def test_candidates(tmp_path):
    row = GOOD["dreamprm-test"]
    first, second = read(tmp_path, row)
    assert texts(first) == ["1. a = 4. b", "2. c", "Answer: B"]
    assert labels(first) == [None] * 3
    assert (first.answer, first.correct, second.answer, second.correct) == ("B", True, "A", False)
    assert first.group == second.group
    assert first.id != second.id
    (other, _) = read(tmp_path, row | {"question": "other"})
    assert other.group != first.group
    named = read(tmp_path, row | {"id": 5})
    assert {e.group for e in named} == {"5"}


def test_prefixes_label_their_last_step(tmp_path):
    (example,) = read(tmp_path, GOOD["dreamprm-train"])
    assert texts(example) == ["Step 1: a", "Step 2: b"]
    assert labels(example) == [None, 0.6363]
    assert (example.domain, example.group) == ("chartqa", "3")
    assert example.id.startswith("3-2#1-")
    kept = {"sid": 2, "score": 7, "times": 11, "ground_truth": "4"}
    assert example.extra == {**kept, "trials": [None, 11]}


def test_question_and_solution_in_one(tmp_path):
    (example,) = read(tmp_path, GOOD["dreamprm-meta"])
    assert example.question == "Question: q\nOptions: (A) 1"
    assert texts(example) == ["Step 1: a", "Step 2: b", "Final answer: A"]
    assert (example.answer, example.correct, example.group) == ("A", True, "2")


def test_stepwise(tmp_path):
    (example,) = read(tmp_path, GOOD["stepwise"])
    assert labels(example) == [1.0, 0.0, 0.25, None]
    assert (example.correct, example.extra) == (True, {"note": 1})
    assert read(tmp_path, GOOD["stepwise"] | {"id": "k"})[0].id == "k"


def test_messages(tmp_path):
    (example,) = read(tmp_path, GOOD["messages"])
    assert (example.question, texts(example), labels(example)) == (
        "What is x?", ["x = 4. Then"], [1.0],
    )  # fmt: skip
    assert example.group == "g"
    inner = {"type": "image", "image": "y.png"}
    record = copy.deepcopy({**GOOD["messages"], "images": None})
    record["messages"][1]["content"][0] = inner
    assert read(tmp_path, record)[0].images == (tmp_path / "y.png",)
    steps = [{"role": "user", "content": "s"}, {"role": "assistant", "content": "-"}]
    (asked,) = read(tmp_path, {"question": "q", "messages": steps})
    assert (asked.question, texts(asked), labels(asked)) == ("q", ["s"], [0.0])


def test_step_benchmarks(tmp_path):
    (example,) = read(tmp_path, GOOD["processbench"])
    assert labels(example) == [1.0, 0.0, None]
    assert (example.id, example.domain, example.correct) == ("gsm8k-12", "gsm8k", False)
    assert example.extra == {"generator": "m", "label": 1}
    (right,) = read(tmp_path, GOOD["processbench"] | {"label": -1})
    assert labels(right) == [1.0, 1.0, 1.0]
    (example,) = read(tmp_path, GOOD["visualprocessbench"])
    assert labels(example) == [1.0, 0.0, None]
    assert (example.domain, example.answer) == ("MMMU", None)
    assert example.extra == {"policy_model": "m", "reference_answer": "4"}
    (example,) = read(tmp_path, GOOD["mathcheck"])
    assert labels(example) == [1.0, 0.0, None]
    (unknown,) = read(tmp_path, GOOD["mathcheck"] | {"labels": None, "outcome_correct": False})
    assert (labels(unknown), unknown.correct) == ([None] * 3, False)


def test_sets_of_candidates(tmp_path):
    (example,) = read(tmp_path, GOOD["mathcheck-candidates"])
    assert (example.id, example.group, example.answer, example.correct) == (
        "geo-0-6.0", "geo-0-6", "7", False,
    )  # fmt: skip
    assert example.extra == {"source_answer": 145.0, "model": "m"}
    (example,) = read(tmp_path, GOOD["game24"])
    assert (labels(example), example.answer, example.group) == ([1.0, 0.0], "6", "900")
    assert "4 5 6 10" in example.question


def test_math_shepherd(tmp_path):
    (example,) = read(tmp_path, GOOD["math-shepherd"])
    assert example.question == "How many?"
    assert texts(example) == ["Step 1: 2 + 3 = 5", "Step 2: 5 - 1 = 3", "Step 3: It is: 3"]
    assert (labels(example), example.domain) == ([1.0, 0.0, 0.0], "GSM8K")
    # A question that speaks of steps, a Russian word, and a last step without mark and label.
    row = {"input": "In Step 1: of знаки? Step 1: a ки\nStep 2: b", "task": None}
    (example,) = read(tmp_path, row | {"label": "In Step 1: of знаки? Step 1: a -\nStep 2: b"})
    assert example.question == "In Step 1: of знаки?"
    assert (texts(example), labels(example)) == (["Step 1: a", "Step 2: b"], [0.0, None])


def test_published_faults_of_math_shepherd(tmp_path):
    # A mark in the question, "step" in small letters, and no name of the first step.
    for text, signs, question, steps in (
        ("Mr. R has 3 ки more. Step 1: a ки\nStep 2: b ки", "-+-", "Mr. R has 3  more.", 2),
        ("How? step 1: a ки\nstep 2: b ки", "+-", "How?", 2),
        ("How many? a ки\nStep 2: b ки", "+-", "How many?", 2),
    ):
        label = text
        for sign in signs:
            label = label.replace("ки", sign, 1)
        (example,) = read(tmp_path, {"input": text, "label": label, "task": "MATH"})
        assert example.question == question
        assert [step.text.rsplit(" ")[-1] for step in example.steps] == ["a", "b"][:steps]
        assert labels(example) == [1.0, 0.0]
        (same,) = read(tmp_path, {"input": text, "value": list(signs)})
        assert (same.question, same.steps) == (example.question, example.steps)
        assert same.extra == example.extra
    assert example.extra == {"question_end": "guessed"}


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("value", ["+", "-", "+"], [1, 0, 1]),
        ("values", [0.5, None, 1], [0.5, None, 1]),
        ("labels", [1.0, 0.0, 0.25], [1, 0, 0.25]),
        ("label", ["-", "-", "+"], [0, 0, 1]),
        ("value", '["-", 0.5, 1]', [0, 0.5, 1]),
    ],
)
def test_openrlhf(tmp_path, key, given, expected):
    (example,) = read(tmp_path, {"input": GOOD["openrlhf"]["text"], key: given})
    assert example.question == "How many?"
    assert texts(example) == ["Step 1: 5", "Step 2: 4", "Step 3: 3"]
    assert labels(example) == expected
    (asked,) = read(tmp_path, {"text": "Q. a ки b ки", "question": "Q.", key: ["+", "-"]})
    assert (asked.question, texts(asked)) == ("Q.", ["a", "b"])


@pytest.mark.parametrize("mark", [" ки\n", "<prm>\n\n", "<extra_0>", " \n\n\n\n\n "])
def test_openr_and_mm_prm_with_any_mark(tmp_path, mark):
    process = f"Step: 1: a{mark}Step: 2: b\n\nc{mark}"
    for key, given in (("labels", [1, 0]), ("label", ["+", "-"])):
        (example,) = read(tmp_path, {"question": "q", "process": process, key: given})
        assert texts(example) == ["Step: 1: a", "Step: 2: b\n\nc"]
        assert labels(example) == [1.0, 0.0]
    turns = [human(f"Question: q\nProcess: {process}"), gpt([1.0, 0.125])]
    (example,) = read(tmp_path, {"id": 0, "image": None, "conversations": turns})
    assert (example.question, texts(example)) == ("q", ["Step: 1: a", "Step: 2: b\n\nc"])
    assert labels(example) == [1.0, 0.125]


def test_a_process_of_one_step_has_one_label(tmp_path):
    row = {"question": "q", "process": "Step: 2: a\n\nb ки"}
    for given in ({"label": 1}, {"label": ["+"]}, {"labels": "+"}):
        (example,) = read(tmp_path, row | given)
        assert (texts(example), labels(example)) == (["Step: 2: a\n\nb"], [1.0])
    tree = {
        "question": "q",
        "answer": "7",
        "image_path": "x.png",
        "process": "a<prm>",
        "labels": [0.5],
    }
    (example,) = read(tmp_path, tree)
    assert example.images == (tmp_path / "x.png",)
    assert example.extra == {"source_answer": "7"}


def test_rlhflow(tmp_path):
    (example,) = read(tmp_path, GOOD["rlhflow"])
    assert (example.question, texts(example), labels(example)) == (
        "What is 1 + 1?", ["Step 1: 1 + 1 = 2", "Step 2: So 3."], [1.0, 0.0],
    )  # fmt: skip


def joined(text, **more):
    turns = [{"content": text, "role": "user"}, {"content": "+", "role": "assistant"}]
    return {"conversations": turns, **more}


@pytest.mark.parametrize(
    ("text", "question", "step"),
    [
        ("Convert (0,3.5) to polar. To convert, we use $r$.", "Convert (0,3.5) to polar.", None),
        ("Tom has 3. How many? First, he has 3. So 4?", "Tom has 3. How many?", None),
        ("求 x 的值。首先，x = 3。", "求 x 的值。", None),
        ("Step 2 of what? Step 1: a", "Step 2 of what?", "Step 1: a"),
    ],
)
def test_a_question_without_a_mark_behind_it_is_cut_alike_in_every_row(
    tmp_path, text, question, step
):
    (example,) = read(tmp_path, joined(text))
    assert (example.question, labels(example)) == (question, [1.0])
    assert " ".join((question, *texts(example))).replace(" ", "") == text.replace(" ", "")
    assert example.extra == ({} if step else {"question_end": "guessed"})
    (asked,) = read(tmp_path, joined(text, question=text[:6]))
    assert (asked.question, texts(asked)) == (text[:6], [text[6:].strip()])
    assert asked.extra == {}


def test_a_single_sentence_holds_no_question_and_step(tmp_path):
    error = first_error(tmp_path, joined("Convert it now."))
    assert error.field == "conversations[0].content"
    assert "'question'" in error.remedy


def test_rlhflow_candidates(tmp_path):
    first, second = read(tmp_path, GOOD["rlhflow-candidates"])
    assert (texts(first), first.correct) == (["a", "The answer is: 1"], True)
    assert (texts(second), second.correct) == (["Step 1: b", "Step 2: The answer is: 2"], False)
    assert (first.answer, second.answer) == ("1", "2")
    assert first.group == second.group
    row = GOOD["rlhflow-candidates"]
    both = read(
        tmp_path, {**{k: v for k, v in row.items() if k != "label"}, "labels": [True, False]}
    )
    assert [example.correct for example in both] == [True, False]


def test_every_leaf_of_a_tree_is_a_solution(tmp_path):
    listed = GOOD["math-aps"]
    leaf = {"children": []}
    tree = {
        "text": "q", "mc_value": 0.75,
        "children": [
            {"text": "a", "mc_value": 0.5, "children": [
                {"text": "b", "mc_value": 1.0, **leaf}, {"text": "c", "mc_value": 0.0, **leaf},
            ]},
            {"text": "d", "mc_value": 0.25, **leaf},
        ],
    }  # fmt: skip
    states = [
        {"state": entry["solution_prefix"][1:], "rollout": "r", "mcs": entry["mc_value"]}
        for entry in listed["reasoning_steps"]
    ]
    for row in (listed, listed | {"reasoning_steps": tree}, {"q": "q", "states": states * 2}):
        solutions = read(tmp_path, row)
        assert [texts(solution) for solution in solutions] == [["a", "b"], ["a", "c"], ["d"]]
        assert [labels(solution) for solution in solutions] == [[0.5, 1.0], [0.5, 0.0], [0.25]]
        assert {solution.question for solution in solutions} == {"q"}
        assert len({solution.id for solution in solutions}) == 3


def test_prm800k(tmp_path):
    solutions = read(tmp_path, GOOD["prm800k"])
    assert [texts(solution) for solution in solutions] == [
        ["a", "d", "f"], ["a", "b"], ["a", "c"], ["a", "d", "e"],
    ]  # fmt: skip
    assert [labels(solution) for solution in solutions] == [
        [1, None, 1], [1, 0], [1, None], [1, None, 0],
    ]  # fmt: skip
    assert solutions[0].extra["ground_truth_answer"] == "2"
    assert solutions[0].extra["finish_reason"] == "solution"
    # Where the labeler found no way on, its completions end the solutions; where nobody had one,
    # the way up to there is one.
    record = copy.deepcopy(GOOD["prm800k"])
    record["label"]["steps"][1:] = [completions(None, ("b", -1), ("c", 1))]
    assert [texts(solution) for solution in read(tmp_path, record)] == [["a", "b"], ["a", "c"]]
    nothing = {"completions": None, "human_completion": None, "chosen_completion": None}
    record["label"]["steps"][1:] = [nothing, nothing]
    assert [texts(solution) for solution in read(tmp_path, record)] == [["a"]]


def test_prmbench(tmp_path):
    (example,) = read(tmp_path, GOOD["prmbench"])
    assert (example.question, texts(example), labels(example)) == ("q?", ["s", "u", "v"], [1, 0, 1])
    assert example.id.startswith("circular_p1_0#1-")
    assert (example.domain, example.extra["original_process"]) == ("circular", ["s", "t"])
    (right,) = read(tmp_path, GOOD["prmbench"] | {"error_steps": []})
    assert labels(right) == [1, 1, 1]


def test_mr_ben(tmp_path):
    (example,) = read(tmp_path, GOOD["mr-ben"])
    assert example.question == "q\nOptions:\nA: 1 \nB: 2"
    assert labels(example) == [1.0, 1.0, 0.0, None]
    assert (example.domain, example.group, example.correct) == ("college_math", "u-1", False)
    right = {"Model_Solution_Correctness": "correct", "Model_Solution_First_Error_Step": "N/A"}
    (example,) = read(tmp_path, GOOD["mr-ben"] | right)
    assert (labels(example), example.correct) == ([1.0] * 4, True)
    # A step that is not called "Step 4" is the fourth; a line of code is the step of that text.
    for given in ("4", "Step 4", 4, "Solution: Choice_B"):
        (example,) = read(tmp_path, GOOD["mr-ben"] | {"Model_Solution_First_Error_Step": given})
        assert labels(example) == [1.0, 1.0, 1.0, 0.0]


def test_big_bench_mistake(tmp_path):
    (example,) = read(tmp_path, GOOD["big-bench-mistake"])
    assert labels(example) == [1.0, 0.0, None]
    assert (example.answer, example.correct) == ("3", False)
    assert example.extra == {"target": "4", "mistake_index": 1}
    (right,) = read(tmp_path, GOOD["big-bench-mistake"] | {"mistake_index": None, "target": "3"})
    assert (labels(right), right.correct) == ([1.0] * 3, True)


def test_mathcheck_as_published(tmp_path):
    row = GOOD["mathcheck-checklist"]
    outcome = row | {"task_type": "outcome_judging"}
    given = [row, outcome | {"answer": "Correct"}, outcome | {"answer": "Incorrect"}]
    given += [
        row | {"task_type": task, "answer": 3.0} for task in ("solving", "answerable_judging")
    ]
    process, right, wrong = read(tmp_path, *given)
    assert texts(process) == ["Step 1: a", "Step 2: b", "Step 3: c", "The answer is 3."]
    assert (labels(process), process.correct) == ([1.0, 0.0, None, None], None)
    assert (labels(right), right.correct) == ([1.0] * 4, True)
    assert (labels(wrong), wrong.correct) == ([None] * 4, False)
    assert (process.id, process.group) == ("0-3", "0")


def test_an_output_of_math_vision_and_the_question_of_the_benchmark(tmp_path):
    (tmp_path / "data").mkdir()
    asked = {"id": "1", "question": "Which?\n<image1>", "options": ["A", "B"], "answer": "A"}
    asked |= {"image": "images/1.jpg", "subject": "logic"}
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps(asked) + "\n")
    row = {
        "id": "1",
        "model": "m",
        "response": "a = 1\nSo A.",
        "model_answer": "a",
        "correct": True,
    }
    (example,) = read(tmp_path, row)
    assert (example.question, texts(example)) == ("Which?\n(A) A\n(B) B", ["a = 1", "So A."])
    assert (example.answer, example.correct, example.group) == ("a", True, "1")
    assert (example.images, example.domain) == ((tmp_path / "images" / "1.jpg",), "logic")
    assert example.extra == {"model": "m"}
    error = first_error(tmp_path, row | {"id": "2"})
    assert (error.field, error.found) == ("id", "the string '2'")
    (tmp_path / "data" / "test.jsonl").unlink()
    error = first_error(tmp_path, row)
    assert error.field == "question"
    assert "clone of MATH-V" in error.remedy
    (inside,) = read(tmp_path, GOOD["math-vision"])
    assert inside.question == "Which one?\n(A) one\n(B) two"


def test_pictures_in_messages_may_be_urls_with_data(tmp_path):
    record = copy.deepcopy({**GOOD["messages"], "images": None})
    content = record["messages"][1]["content"]
    url = "data:image/png;base64,iVBORw0KGgo="
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": {"bytes": "iVBORw0KGgo=", "path": None}},
    ):
        content[0] = part
        assert read(tmp_path, record)[0].images == (embedded(b"\x89PNG\r\n\x1a\n"),)
    content[0] = {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}
    error = first_error(tmp_path, record)
    assert error.field == "messages[1].content[0].image_url"
    assert "nothing is fetched" in error.remedy


@pytest.mark.parametrize(
    "name", [name for name in GOOD if "image" in GOOD[name] or "images" in GOOD[name]]
)
def test_every_format_takes_pictures_as_bytes(tmp_path, name):
    key = "image" if "image" in GOOD[name] else "images"
    picture = {"bytes": "iVBORw0KGgo=", "path": "x.png"}
    for value in (picture, [picture]):
        if name == "prm-jsonl" and isinstance(value, dict):
            continue
        for example in read(tmp_path, GOOD[name] | {key: value}):
            assert example.images == (embedded(b"\x89PNG\r\n\x1a\n"),)


@pytest.mark.parametrize("given", [[1, -1, 1], [1, 0, -1], [-1, -1], [1, -1, 0]])
def test_labels_that_can_mean_two_things_are_refused(tmp_path, given):
    row = {"id": "a", "question": "Q?", "steps": ["s"] * len(given), "labels": given}
    error = first_error(tmp_path, row)
    assert (error.field, error.expected) == ("labels", "labels of one meaning")
    assert "PRM800K" in error.found
    assert "first_error" in error.remedy
    good, bad = iter_rows(write(tmp_path, row | {"labels": [1] * len(given)}, row))
    assert labels(good.examples[0]) == [1.0] * len(given)
    assert bad.expected == "labels of one meaning"


def test_what_the_refusal_of_ambiguous_labels_advises_is_read(tmp_path):
    row = {"id": "a", "question": "Q?", "steps": ["s", "t", "u"]}
    for given in (
        {"labels": [1, "-", None]},
        {"labels": [1, 0, None]},
        {"labels": ["+", "-", None]},
    ):
        assert labels(read(tmp_path, row | given)[0]) == [1.0, 0.0, None]
    assert labels(read(tmp_path, row | {"labels": [1, 0, -1], "first_error": 2})[0]) == [1, 0, None]
    assert labels(read(tmp_path, row | {"labels": None})[0]) == [None] * 3


@pytest.mark.parametrize(
    ("given", "error", "found"),
    [
        ([1, 0, -1], 1, "first_error 1, and labels in which step 2 is the first wrong one"),
        ([1, 0, -1], 0, "first_error 0, and labels in which step 2 is the first wrong one"),
        ([1, 1, 1], 2, "first_error 2, and labels in which no step is wrong"),
        ([1, 1, -1], 0, "first_error 0, and labels in which no step is wrong, -1 at step 3"),
        (
            [1, -1, 0],
            3,
            "first_error 3, and labels in which step 3 is the first wrong one, -1 at step 2",
        ),
    ],
)
def test_labels_that_contradict_the_first_error_are_refused(tmp_path, given, error, found):
    row = {
        "id": "a",
        "question": "Q?",
        "steps": ["s", "t", "u"],
        "labels": given,
        "first_error": error,
    }
    refused = first_error(tmp_path, row)
    assert (refused.field, refused.found) == ("first_error", found)
    assert "'labels'" in refused.expected


def test_steps_as_texts_without_labels_are_told_what_is_short_of_what(tmp_path):
    error = first_error(tmp_path, {"id": "a", "question": "Q?", "steps": ["s1", "s2"]})
    assert error.field == "labels"
    assert error.expected == "the field 'labels', a list of 2, one for every step"
    error = first_error(tmp_path, {"id": "a", "question": "Q?", "steps": ["s"], "label": [1]})
    assert (error.field, error.remedy) == ("labels", "rename 'label' to 'labels'")


def test_an_unknown_record_is_told_the_nearest_format(tmp_path):
    error = first_error(tmp_path, {"prompt": "q", "labels": [1]})
    assert error.remedy.endswith("stepwise is nearest, and lacks 'completions'")
    assert first_error(tmp_path, {"class": 1}).remedy == "rename keys or convert"


def changed(name, **changes):
    record = copy.deepcopy(GOOD[name])
    record.update(changes)
    return {key: value for key, value in record.items() if value is not ...}


def turns(*given):
    return changed("visualprm", conversations=list(given))


def step_of(name, field, number, **changes):
    record = copy.deepcopy(GOOD[name])
    entry = record[field][number]
    entry.update(changes)
    record[field][number] = {k: v for k, v in entry.items() if v is not ...}
    return record


def response(**changes):
    inner = GOOD["visualprocessbench"]["response"] | changes
    return changed("visualprocessbench", response={k: v for k, v in inner.items() if v is not ...})


def of_prm800k(*steps):
    return changed("prm800k", label={"steps": list(steps)})


Q, S = human("### Question:\nq"), human("s")
BAD = {
    "visualprm": [
        (turns(), "conversations", "at least one turn", "an empty list"),
        (turns(3), "conversations[0]", "an object", "the number 3"),
        (turns({"value": "x"}), "conversations[0].from", "'from'", "nothing"),
        (turns({"from": "human"}), "conversations[0].value", "'value'", "nothing"),
        (turns({"from": "user", "value": "x"}), "conversations[0].from", '"gpt"', "'user'"),
        (turns({"from": ["a"], "value": "x"}), "conversations[0].from", '"gpt"', "a list of 1"),
        (turns(human(3)), "conversations[0].value", "a string", "the number 3"),
        (turns(human(" ")), "conversations[0].value", "not blank", "' '"),
        (turns(SYSTEM), "conversations", "a user turn", "null"),
        (turns(gpt("+")), "conversations[0].value", "a user turn", "'assistant'"),
        (turns(Q), "conversations[0].value", "first step", "Question"),
        (turns(Q, gpt("+")), "conversations[0].value", "Solution Process", "Question"),
        (turns(Q, S), "conversations[1].value", "behind every step", "'s'"),
        (turns(Q, S, S, gpt("+")), "conversations[1].value", "behind every step", "'s'"),
        (turns(Q, S, gpt("+"), gpt("+")), "conversations[3].value", "with a step", "'assistant'"),
        (turns(Q, S, gpt("yes")), "conversations[2].value", '"+" or "-"', "'yes'"),
        (turns(human("### Question:\n"), S, gpt("+")), "conversations[0].value", "blank", "''"),
        (changed("visualprm", true_false=1), "true_false", "true, false", "the number 1"),
        (changed("visualprm", true_false=None), "true_false", "true or false", "null"),
        (changed("visualprm", image=3), "image", "a path, a list of paths", "the number 3"),
        (changed("visualprm", image=[""]), "image[0]", "not blank", "''"),
        (changed("visualprm", images=["y.png"]), "images", "in one field", "a list of 1"),
        (changed("visualprm", id=1.5), "id", "a string", "1.5"),
        (changed("visualprm", dataset=[1]), "dataset", "a string", "a list of 1"),
    ],
    "visualprm-raw": [
        (changed("visualprm-raw", question=...), "question", "'question'", "nothing"),
        (changed("visualprm-raw", steps_with_score=[]), "steps_with_score", "one step", "empty"),
        (changed("visualprm-raw", steps_with_score=["s"]), "steps_with_score[0]", "object", "'s'"),
        (step_of("visualprm-raw", "steps_with_score", 1, step=...),
         "steps_with_score[1].step", "'step'", "nothing"),
        (step_of("visualprm-raw", "steps_with_score", 1, num_mc_correct=17),
         "steps_with_score[1].num_mc_correct", "right <= all", "[17, 16]"),
        (step_of("visualprm-raw", "steps_with_score", 1, num_mc_total=..., score=2),
         "steps_with_score[1].score", "[0, 1]", "the number 2"),
    ],
    "dreamprm-test": [
        (changed("dreamprm-test", question=...), "question", "'question'", "nothing"),
        (changed("dreamprm-test", candidates=[]), "candidates", "at least one", "empty"),
        (changed("dreamprm-test", candidates="a"), "candidates", "a list", "'a'"),
        (changed("dreamprm-test", true_false=[True]), "true_false", "as many", "1 for 2"),
        (changed("dreamprm-test", true_false=[True, 1]), "true_false[1]", "true or false", "1"),
        (changed("dreamprm-test", candidates=["a", 3]), "candidates[1]", "a string", "3"),
        (changed("dreamprm-test", candidates=["a", " "]), "candidates[1]", "not blank", "' '"),
        (changed("dreamprm-test", candidates=["a", "[Reasoning]\n"]),
         "candidates[1]", "at least one step", "[Reasoning]"),
    ],
    "dreamprm-train": [
        (changed("dreamprm-train", add=""), "add", "not blank", "''"),
        (changed("dreamprm-train", accuracy=1.2), "accuracy", "[0, 1]", "1.2"),
        (changed("dreamprm-train", accuracy=None), "accuracy", "[0, 1]", "null"),
        (changed("dreamprm-train", input=None), "input", "a string", "null"),
    ],
    "dreamprm-meta": [
        (changed("dreamprm-meta", input="Question: only"), "input", '"Step 1"', "only"),
        (changed("dreamprm-meta", input="Step 1: no question"), "input", "the question", "Step 1"),
        (changed("dreamprm-meta", true_false="yes"), "true_false", "true, false", "'yes'"),
        (changed("dreamprm-meta", true_false=None), "true_false", "true or false", "null"),
    ],
    "stepwise": [
        (changed("stepwise", prompt=...), "prompt", "'prompt'", "nothing"),
        (changed("stepwise", prompt=[{"role": "user"}]), "prompt", "a string", "a list of 1"),
        (changed("stepwise", labels=..., label=[]), "labels", "'labels'", "nothing"),
        (changed("stepwise", completions=[]), "completions", "at least one step", "empty"),
        (changed("stepwise", completions=["a", "", "b", "c"]), "completions[1]", "blank", "''"),
        (changed("stepwise", labels=[1]), "labels", "as many labels as steps", "1 for 4"),
        (changed("stepwise", labels=[1, 0, 3, 1]), "labels[2]", "[0, 1]", "the number 3"),
        (changed("stepwise", labels=[1, 0, [3, 2], 1]), "labels[2]", "right <= all", "[3, 2]"),
        (changed("stepwise", labels=[1, 0, [3], 1]), "labels[2]", "[right, all]", "[3]"),
        (changed("stepwise", labels=[1, 0, "good", 1]), "labels[2]", "true, false", "'good'"),
        (changed("stepwise", labels={"a": 1}), "labels", "a list of labels", "an object"),
        (changed("stepwise", images="x.png", image="y"), "image", "in one field", "'y'"),
    ],
    "messages": [
        (changed("messages", messages=[]), "messages", "at least one message", "empty"),
        (changed("messages", messages=["a"]), "messages[0]", "an object", "'a'"),
        (step_of("messages", "messages", 1, role=...), "messages[1].role", "'role'", "nothing"),
        (step_of("messages", "messages", 1, role="human"), "messages[1].role", '"user"', "'human'"),
        (step_of("messages", "messages", 1, content=3), "messages[1].content", "a string", "3"),
        (step_of("messages", "messages", 1, content=[{"type": "video"}]),
         "messages[1].content[0]", '"text" or "image"', "an object"),
        (step_of("messages", "messages", 1, content=["a"]),
         "messages[1].content[0]", '"text" or "image"', "'a'"),
        (step_of("messages", "messages", 2, content="yes"), "messages[2].content", '"-"', "'yes'"),
        (step_of("messages", "messages", 1, content=[{"type": "image", "path": "a.png"}]),
         "images", "not both", "1 in the messages"),
    ],
    "processbench": [
        (changed("processbench", label=3), "label", "0 to 2", "3"),
        (changed("processbench", label=-2), "label", "-1 or the index", "-2"),
        (changed("processbench", label=True), "label", "-1 or the index", "true"),
        (changed("processbench", steps=["s", 3, "u"]), "steps[1]", "a string", "3"),
        (changed("processbench", final_answer_correct=1), "final_answer_correct", "true", "1"),
        (changed("processbench", id=...), "id", "'id'", "nothing"),
    ],
    "visualprocessbench": [
        (response(steps=...), "response.steps", "'response.steps'", "nothing"),
        (response(steps=[]), "response.steps", "at least one step", "empty"),
        (response(process_correctness=[1]), "response.process_correctness", "as many", "1 for 3"),
        (response(process_correctness=[1, 2, 0]),
         "response.process_correctness[1]", "one of 1, -1, 0", "2"),
        (response(process_correctness=[1, True, 0]),
         "response.process_correctness[1]", "one of 1, -1, 0", "true"),
        (changed("visualprocessbench", question=""), "question", "not blank", "''"),
    ],
    "mathcheck": [
        (changed("mathcheck", labels=[1, 0]), "labels", "as many labels", "2 for 3"),
        (changed("mathcheck", labels=[1, 0, 0.5]), "labels[2]", "one of 1, 0, -1", "0.5"),
        (changed("mathcheck", first_error="x"), "first_error", "an integer", "'x'"),
        (changed("mathcheck", id=...), "id", "'id'", "nothing"),
    ],
    "mathcheck-candidates": [
        (step_of("mathcheck-candidates", "candidates", 0, response=" "),
         "candidates[0].response", "not blank", "' '"),
        (step_of("mathcheck-candidates", "candidates", 0, auto_correct=1),
         "candidates[0].auto_correct", "true or false", "1"),
        (step_of("mathcheck-candidates", "candidates", 0, auto_correct=...),
         "candidates[0].auto_correct", "'auto_correct'", "nothing"),
    ],
    "game24": [
        (changed("game24", candidates=[3]), "candidates[0]", "an object", "3"),
        (step_of("game24", "candidates", 0, steps=[]), "candidates[0].steps", "at least", "empty"),
        (step_of("game24", "candidates", 0, correct=2), "candidates[0].correct", "0 or 1", "2"),
        (step_of("game24", "candidates", 0, steps=[{"text": "a"}]),
         "candidates[0].steps[0].valid", "'valid'", "nothing"),
    ],
    "math-shepherd": [
        (changed("math-shepherd", label=...), "label", "'label'", "nothing"),
        (changed("math-shepherd", input="Q Step 1: a"), "input", '"ки"', "Step 1"),
        (changed("math-shepherd", input=3), "input", "a string", "3"),
        (changed("math-shepherd", input="Q Step 1: a ки", label="Q Step 1: a *"),
         "label", "+ or -", "mark 1"),
        (changed("math-shepherd", input="Q Step 1: a ки", label="Q Step 1: b +"),
         "label", "+ or -", "mark 1"),
        (changed("math-shepherd", input="Q Step 1: a ки", label="Q Step 1: a + more"),
         "label", "+ or -", "more"),
        (changed("math-shepherd", input="a ки", label="a +"), "input", "a question", "'a '"),
        (changed("math-shepherd", input="Q Step 1: a ки ки", label="Q Step 1: a + -"),
         "input", "before every mark", "step 2 of 2"),
    ],
    "openrlhf": [
        (changed("openrlhf", text=...), "input", "'input'", "nothing"),
        (changed("openrlhf", value=...), "value", "'value'", "nothing"),
        (changed("openrlhf", value=[1, 0]), "value", "as many labels", "2 for 3"),
        (changed("openrlhf", value=[1, 0, 2]), "value[2]", "[0, 1]", "2"),
        (changed("openrlhf", value=[1, 0, "good"]), "value[2]", "[0, 1]", "'good'"),
        (changed("openrlhf", value="[1, 0"), "value", "as many labels", "1 for 3"),
        (changed("openrlhf", text="no steps ки"), "text", '"Step 1:"', "no steps"),
        (changed("openrlhf", text="Step 1: a ки"), "text", "a question", "Step 1"),
    ],
    "openr": [
        (changed("openr", process=...), "process", "'process'", "nothing"),
        (changed("openr", label=...), "label", "'label'", "nothing"),
        (changed("openr", label=["+"]), "label", "as many labels", "1 for 2"),
        (changed("openr", label=["+", "?"]), "label[1]", '"+"', "'?'"),
        (changed("openr", label={}), "label", "as many labels", "1 for 2"),
        (changed("openr", process="<prm><prm>"), "process", "before every mark", "step 1 of"),
        (changed("openr", question=" "), "question", "not blank", "' '"),
    ],
    "mm-prm": [
        (changed("mm-prm", conversations=[human("q")]), "gpt", "'gpt'", "nothing"),
        (changed("mm-prm", conversations=["q"]), "conversations[0]", "an object", "'q'"),
        (changed("mm-prm", conversations=[human("q"), gpt([1]), human("r")]),
         "conversations[2].from", 'one turn of "human"', "'human'"),
        (changed("mm-prm", conversations=[{"from": ["gpt"], "value": [1]}]),
         "conversations[0].from", 'one turn of "human"', "a list of 1"),
        (changed("mm-prm", conversations=[human("q"), gpt([1])]),
         "conversations[0].value", '"Question: ..."', "'q'"),
        (changed("mm-prm", conversations=[human("Question: q\nProcess: a<prm>"), gpt([1, 1])]),
         "conversations[1].value", "as many labels", "2 for 1"),
        (changed("mm-prm", conversations=[human("Question: q\nProcess: a<prm>"), gpt([2])]),
         "conversations[1].value[0]", "[0, 1]", "2"),
    ],
    "rlhflow": [
        (changed("rlhflow", conversations=[]), "conversations", "at least one turn", "empty"),
        (changed("rlhflow", conversations=[{"role": "user"}]),
         "conversations[0].content", "'content'", "nothing"),
        (step_of("rlhflow", "conversations", 1, content="yes"),
         "conversations[1].content", '"+" or "-"', "'yes'"),
        (step_of("rlhflow", "conversations", 0, content="What is it"),
         "conversations[0].content", '"Step 1:"', "What is it"),
        (step_of("rlhflow", "conversations", 0, role="human"),
         "conversations[0].role", '"user"', "'human'"),
    ],
    "rlhflow-candidates": [
        (changed("rlhflow-candidates", label=[1]), "label", "as many values as answers", "1 for 2"),
        (changed("rlhflow-candidates", label=[1, 2]), "label[1]", "1 or 0", "2"),
        (changed("rlhflow-candidates", label=...), "label", "'label'", "nothing"),
        (changed("rlhflow-candidates", answers=["a", ""]), "answers[1]", "not blank", "''"),
        (changed("rlhflow-candidates", answers=[]), "answers", "at least one answer", "empty"),
    ],
    "math-aps": [
        (changed("math-aps", reasoning_steps=[]), "reasoning_steps", "at least one node", "empty"),
        (changed("math-aps", reasoning_steps=[{"solution_prefix": "q", "mc_value": 1}]),
         "reasoning_steps", "behind the question", "a list of 1"),
        (changed("math-aps", reasoning_steps=["a"]), "reasoning_steps[0]", "an object", "'a'"),
        (step_of("math-aps", "reasoning_steps", 1, mc_value=...),
         "reasoning_steps[1].mc_value", "mc_value", "nothing"),
        (step_of("math-aps", "reasoning_steps", 1, mc_value=2),
         "reasoning_steps[1].mc_value", "[0, 1]", "2"),
        (changed("math-aps", reasoning_steps={"text": "q"}),
         "reasoning_steps.children", "a list of nodes", "null"),
        (changed("math-aps", reasoning_steps={"text": "q", "children": [{"text": "a"}]}),
         "reasoning_steps.children[0].mc_value", "mc_value", "nothing"),
    ],
    "prm800k": [
        (changed("prm800k", question="q"), "question", "an object", "'q'"),
        (changed("prm800k", question={}), "question.problem", "problem", "nothing"),
        (changed("prm800k", label={"steps": []}), "label.steps", "at least one step", "empty"),
        (of_prm800k({"completions": None}),
         "label.steps[0].chosen_completion", "chosen_completion", "nothing"),
        (of_prm800k(completions(2, ("a", 1))),
         "label.steps[0].chosen_completion", "index of one of 1", "2"),
        (of_prm800k(completions(0, ("a", 2))),
         "label.steps[0].completions[0].rating", "1, 0, -1", "2"),
        (of_prm800k(completions(0, (" ", 1))),
         "label.steps[0].completions[0].text", "not blank", "' '"),
        (of_prm800k(completions(None, ("a", 1)), completions(0, ("b", 1))),
         "label.steps[0].chosen_completion", "every step but the last", "1 steps behind"),
        (of_prm800k(completions(None)), "label.steps", "at least one completion", "a list of 1"),
    ],
    "prmbench": [
        (changed("prmbench", error_steps=[4]), "error_steps[0]", "1 to 3", "4"),
        (changed("prmbench", error_steps=[0]), "error_steps[0]", "1 to 3", "0"),
        (changed("prmbench", error_steps=2), "error_steps", "a list", "2"),
        (changed("prmbench", modified_process=["s", "", "v"]),
         "modified_process[1]", "not blank", "''"),
        (changed("prmbench", modified_process=...), "modified_process", "modified", "nothing"),
    ],
    "mr-ben": [
        (changed("mr-ben", Model_Solution_Steps=["Step 1: a", " "]),
         "Model_Solution_Steps[1]", "not blank", "' '"),
        (changed("mr-ben", Model_Solution_Correctness="right"),
         "Model_Solution_Correctness", '"correct"', "'right'"),
        (changed("mr-ben", Model_Solution_First_Error_Step="9"),
         "Model_Solution_First_Error_Step", '"1" to "4"', "'9'"),
        (changed("mr-ben", Model_Solution_First_Error_Step="N/A"),
         "Model_Solution_First_Error_Step", "Correctness is 'incorrect'", "'N/A'"),
        (changed("mr-ben", Model_Solution_Correctness="correct"),
         "Model_Solution_First_Error_Step", "Correctness is 'correct'", "'2'"),
    ],
    "big-bench-mistake": [
        (changed("big-bench-mistake", mistake_index=3), "mistake_index", "0 to 2", "3"),
        (changed("big-bench-mistake", mistake_index=-1), "mistake_index", "0 to 2", "-1"),
        (changed("big-bench-mistake", steps=["a", ""]), "steps[1]", "not blank", "''"),
        (changed("big-bench-mistake", steps=[]), "steps", "at least one step", "empty"),
    ],
    "mathcheck-checklist": [
        (changed("mathcheck-checklist", answer="Step 9"), "answer", '"Step 4"', "'Step 9'"),
        (changed("mathcheck-checklist", answer="Correct"), "answer", '"Step 1"', "'Correct'"),
        (changed("mathcheck-checklist", task_type="outcome_judging"),
         "answer", '"Correct"', "Step"),
        (changed("mathcheck-checklist", task_type="other"), "task_type", "solving", "'other'"),
        (changed("mathcheck-checklist", solution=...), "solution", "'solution'", "nothing"),
        (changed("mathcheck-checklist", solution="[Reasoning]"), "solution", "one step", "[Reas"),
    ],
    "math-vision": [
        (changed("math-vision", response=" "), "response", "not blank", "' '"),
        (changed("math-vision", correct=None), "correct", "true or false", "null"),
        (changed("math-vision", question=...), "question", "data/test.jsonl", "neither"),
    ],
}  # fmt: skip
TABLE = [(name, *case) for name, cases in BAD.items() for case in cases]


def test_every_foreign_format_has_malformed_records_here():
    assert {"prm-jsonl", *BAD} == set(FORMAT_NAMES)  # those of our own: test_reader.py


@pytest.mark.parametrize(("name", "record", "field", "expected", "found"), TABLE)
def test_malformed_records_are_named(tmp_path, name, record, field, expected, found):
    error = first_error(tmp_path, record, format=name)
    assert error.field == field
    assert expected in error.expected
    assert found in error.found
    message = str(error)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'data.json'}:1: field {field}: expected ")


@pytest.mark.parametrize("record", [3, "x", None, [1]])
def test_rows_that_are_no_objects(tmp_path, record):
    for format in ("auto", *FORMAT_NAMES):
        (error,) = iter_rows(write(tmp_path, record, array=True), format=format)
        assert error.expected == "a JSON object"


def test_an_ambiguous_record_lists_its_candidates(tmp_path):
    both = {**GOOD["stepwise"], **GOOD["visualprm"], "images": None}
    error = first_error(tmp_path, both)
    assert "visualprm or stepwise" in error.expected
    assert "name the format (visualprm, stepwise)" in error.remedy
    assert len(read(tmp_path, both, format="stepwise")) == 1
    del both["labels"]  # of four steps, where the conversation has two
    assert len(read(tmp_path, both, format="visualprm")) == 1


def test_an_unknown_record_lists_all_formats(tmp_path):
    error = first_error(tmp_path, {"text": "a", "class": 1})
    assert all(name in error.expected for name in FORMAT_NAMES)
    assert error.found == "the keys 'text', 'class'"
    with pytest.raises(ValueError, match=r"expected a format among prm-jsonl, .*found 'parquet'"):
        list(iter_rows(write(tmp_path, {}), format="parquet"))


def test_a_record_of_another_format_than_the_first_is_an_error(tmp_path):
    good, bad, more = iter_rows(
        write(tmp_path, GOOD["visualprm"], GOOD["stepwise"], GOOD["visualprm"])
    )
    assert isinstance(good, Row)
    assert (bad.line, bad.field, bad.found) == (2, "conversations", "nothing")
    assert isinstance(more, Row)


def test_records_before_the_first_that_can_be_told_are_errors_each(tmp_path):
    first, second = iter_rows(write(tmp_path, {"a": 1}, GOOD["stepwise"]))
    assert (first.line, second.line, second.format) == (1, 2, "stepwise")


def test_what_a_missing_key_might_have_been(tmp_path):
    error = first_error(tmp_path, changed("stepwise", labels=..., lables=[]))
    assert (error.field, error.remedy) == ("labels", "rename 'lables' to 'labels'")


@pytest.mark.parametrize("name", GOOD)
def test_what_is_read_can_be_written_as_our_own(tmp_path, name):
    from prm.data.reader import read_jsonl, write_jsonl

    (tmp_path / "x.png").touch()
    examples = read(tmp_path, GOOD[name])
    write_jsonl(tmp_path / "own.jsonl", examples)
    assert read_jsonl(tmp_path / "own.jsonl") == examples


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("visualprm-raw", "question"),
        ("dreamprm-test", "question"),
        ("stepwise", "prompt"),
        ("visualprocessbench", "question"),
    ],
)
def test_a_question_of_nothing_but_marks_is_refused(tmp_path, name, field):
    error = first_error(tmp_path, {**GOOD[name], field: "<image>\n"}, format=name)
    assert (error.field, error.expected) == (field, "a string that is not blank")


def test_a_label_of_hundreds_of_digits_is_refused(tmp_path):
    steps = [{"text": "s", "label": 10**400}]
    error = first_error(tmp_path, {**GOOD["prm-jsonl"], "steps": steps})
    assert (error.field, error.expected[:3]) == ("steps[0].label", '"+"')


def test_one_bad_answer_of_best_of_n_does_not_take_the_others(tmp_path):
    row = GOOD["rlhflow-candidates"] | {"answers": ["So 5.", "", "So 6."], "label": [1, 0, 2]}
    blank, value, good = iter_rows(write(tmp_path, row))
    assert (blank.field, value.field) == ("answers[1]", "label[2]")
    assert [example.steps[0].text for example in good.examples] == ["So 5."]


def test_a_file_of_mr_ben_is_an_object_of_lists_of_rows(tmp_path):
    blank = GOOD["mr-ben"] | {"Model_Solution_Steps": ["Step 1: a", ""]}
    path = tmp_path / "data.json"
    held = {"u-1": [GOOD["mr-ben"], blank], "u-2": [GOOD["mr-ben"]]}
    path.write_text(json.dumps(held, indent=2), encoding="utf-8")
    first, second, third = iter_rows(path)
    assert [row.line for row in (first, second, third)] == [1, 2, 3]
    assert second.field == "Model_Solution_Steps[1]"
    assert first.record == third.record == GOOD["mr-ben"]


@pytest.mark.parametrize("name", FORMAT_NAMES[1:])
def test_an_object_of_empty_lists_is_an_error_in_every_format(tmp_path, name):
    for record in ({"conversations": []}, {"u-1": [], "u-2": []}, {}):
        (error,) = iter_rows(write(tmp_path, record), format=name)
        assert isinstance(error, DataError)


def test_the_mark_of_a_picture_behind_question_is_no_part_of_it(tmp_path):
    """MM-PRM's rows have it in front of "Question:" or behind it."""
    row = GOOD["mm-prm"]
    turns = [human("Question: <image>\nHow many?\nProcess: a<prm>\nb<prm>"), gpt([1.0, 0.0])]
    (example,) = read(tmp_path, row | {"conversations": turns})
    assert example.question == "How many?"


STEPS = [{"text": "s", "label": "+"}, {"text": "t", "label": "-"}]
BARE = [{"text": "s"}, {"text": "t"}]


@pytest.mark.parametrize(
    ("steps", "more", "field"),
    [
        (STEPS, {"labels": [0, 1]}, "labels[0]"),
        (STEPS, {"labels": [True, True]}, "labels[1]"),
        (STEPS, {"labels": ["+", "-", "-"]}, "labels"),
        (BARE, {"labels": [1, 0]}, "labels"),
        (STEPS, {"first_error": 1}, "first_error"),
        (STEPS, {"first_error": 0}, "first_error"),
        (STEPS, {"first_error": -1}, "first_error"),
        (STEPS, {"first_error": 3}, "first_error"),
        (STEPS, {"first_error": "2"}, "first_error"),
        (STEPS[:1], {"first_error": 1}, "first_error"),
    ],
)
def test_a_second_source_of_labels_may_not_contradict_the_steps(tmp_path, steps, more, field):
    error = first_error(tmp_path, {"id": "a", "question": "q", "steps": steps, **more})
    assert error.field == field
    if steps is not BARE and "labels" not in more:
        row = {"prompt": "q", "completions": [step["text"] for step in steps]}
        row["labels"] = [step["label"] == "+" for step in steps]
        assert first_error(tmp_path, row | more).field == field


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        (STEPS, {"labels": [1, 0], "first_error": 2}),
        (STEPS, {"labels": ["+", "-"]}),
        (STEPS, {"labels": [1, -1]}),
        (STEPS, {"labels": [None, 0.25]}),
        (STEPS, {"labels": ["geometry", "easy"]}),
        (STEPS, {"labels": None, "first_error": None}),
        (BARE, {"labels": [None, None], "first_error": 1}),
        (STEPS[:1], {"first_error": 0}),
        (STEPS[:1], {"first_error": -1}),
        ([STEPS[0], BARE[1]], {"first_error": 2}),
    ],
)
def test_a_second_source_of_labels_that_agrees_is_kept(tmp_path, steps, more):
    row = {"id": "a", "question": "q", "steps": steps, **more}
    (example,) = read(tmp_path, row)
    assert labels(example) == [{"+": 1.0, "-": 0.0}.get(step.get("label")) for step in steps]
    assert example.extra == more
