"""Every data format: what its records become, and how each mistake is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from prm.data.formats.table import FORMATS
from prm.data.reader import Row, iter_rows, read_examples
from prm.names import FORMAT_NAMES
from prm.schema import DataError, Step, StepExample
from tests.prm.data.formats.good_records import GOOD, SYSTEM, gpt, human


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
