"""Solutions whose steps people judged one by one.

- ``visualprocessbench``: ``{"image", "question", "answer", "response": {"steps",
  "process_correctness"}, "policy_model", "data_source"}``. 1 means right, -1 wrong, and 0 neutral
  (no label).
- ``prm800k``: ``{"question": {"problem", "ground_truth_answer"}, "label": {"steps":
  [{"completions": [{"text", "rating"}], "human_completion", "chosen_completion"}],
  "finish_reason"}}``. The way that
  the labeler took, over chosen completions and those that a person wrote, is a solution if it has
  an end; and at every step each completion that was not chosen ends a solution of its own, behind
  the way up to there (the reading of TRL). 1 means right and -1 wrong; 0, neutral, and null, not
  rated (what a person wrote), are no label.
- ``prmbench``: ``{"original_question", "modified_question", "original_process",
  "modified_process", "modified_steps", "error_steps", "reason", "idx", "classification"}``. The
  modified solution is the example: the steps whose numbers, from 1, are in ``error_steps`` are
  wrong, all others right. The original one is kept in ``extra``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prm.data.formats.stepwise import labelled_steps
from prm.data.formats.turns import question_text
from prm.data.record_fields import Location, Words, extra_of
from prm.schema import Step, StepExample

_SIGNS: Mapping[int | str, float | None] = {1: 1.0, -1: 0.0, 0: None}


def matches_visualprocessbench(record: Mapping[str, Any]) -> bool:
    """Whether the record's response holds steps and their correctness."""
    response = record.get("response")
    return isinstance(response, dict) and "process_correctness" in response


def matches_prm800k(record: Mapping[str, Any]) -> bool:
    """Whether the record's label holds steps, and its question a problem."""
    question, label = record.get("question"), record.get("label")
    return isinstance(question, dict) and isinstance(label, dict) and "steps" in label


def matches_prmbench(record: Mapping[str, Any]) -> bool:
    """Whether the record is a modified solution with the numbers of its wrong steps."""
    return {"modified_process", "error_steps"} <= record.keys()


def read_visualprocessbench(
    record: Mapping[str, Any], location: Location
) -> tuple[StepExample, ...]:
    """Return the example of a VisualProcessBench row.

    Raises:
        DataError: A field is wrong; the error names it (``response.process_correctness[2]``).
    """
    location.need(record, "question", "response")
    response = record["response"]
    if not isinstance(response, dict):
        location.refuse("response", 'an object with "steps" and "process_correctness"', response)
    fields = {f"response.{name}": value for name, value in response.items()}
    location.need(fields, "response.steps", "response.process_correctness")
    images = location.images(record, "image", "images")
    question = question_text(record, "question", len(images), location)
    steps = labelled_steps(
        fields, "response.steps", "response.process_correctness", location, _SIGNS
    )
    used = ("id", "question", "image", "images", "response", "data_source", "answer")
    return (
        StepExample(
            id=location.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=steps,
            domain=location.name(record, "data_source"),
            extra=extra_of(record, used, reference_answer=record.get("answer")),
        ),
    )


def read_prm800k(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the solutions of a row of PRM800K; see the module for which these are.

    Raises:
        DataError: A field is wrong; the error names it
            (``label.steps[2].completions[0].rating``).
    """
    location.need(record, "question", "label")
    asked, label = record["question"], record["label"]
    if not isinstance(asked, dict):
        location.refuse("question", 'an object with "problem"', asked)
    if not isinstance(label, dict):
        location.refuse("label", 'an object with "steps"', label)
    location.need_in(asked, "question", "problem")
    location.need_in(label, "label", "steps")
    question = location.text(asked["problem"], "question.problem")
    solutions = _solutions(location.listed(label["steps"], "label.steps", "steps"), location)
    if not solutions:
        location.refuse("label.steps", "at least one completion", label["steps"], "remove the row")
    extra = extra_of(
        record,
        ("id", "question", "label", "group"),
        ground_truth_answer=asked.get("ground_truth_answer"),
        finish_reason=label.get("finish_reason"),
    )
    raw = location.name(record, "id")
    return tuple(
        StepExample(
            id=location.default_id(raw, (question, *(step.text for step in steps)), number),
            question=question,
            images=(),
            steps=steps,
            group=location.name(record, "group"),
            extra=extra,
        )
        for number, steps in enumerate(solutions)
    )


def _solutions(given: list[Any], location: Location) -> list[tuple[Step, ...]]:
    ended: list[tuple[Step, ...]] = []
    way: list[Step] = []
    for number, entry in enumerate(given):
        field = f"label.steps[{number}]"
        if not isinstance(entry, dict):
            location.refuse(field, 'an object with "completions"', entry)
        location.need_in(entry, field, "completions", "chosen_completion")
        rated = _completions(entry["completions"], f"{field}.completions", location)
        chosen, human = entry["chosen_completion"], entry.get("human_completion")
        whole = isinstance(chosen, int) and not isinstance(chosen, bool)
        if chosen is not None and not (whole and 0 <= chosen < len(rated)):
            expected = f"null or the index of one of {len(rated)} completions"
            location.refuse(f"{field}.chosen_completion", expected, chosen)
        ended += [(*way, step) for count, step in enumerate(rated) if count != chosen]
        if chosen is None and human is None:
            behind = [step for step in given[number + 1 :] if not _is_empty(step)]
            if behind:
                found = Words(f"null, and {len(behind)} steps behind it")
                expected = "a completion that was chosen or written, in every step but the last"
                location.refuse(f"{field}.chosen_completion", expected, found)
            return ended if rated or not way else [tuple(way), *ended]
        on = rated[chosen] if whole else _completion(human, f"{field}.human_completion", location)
        way.append(on)
    return [tuple(way), *ended]


def _is_empty(step: object) -> bool:
    names = ("completions", "human_completion", "chosen_completion")
    return isinstance(step, dict) and all(step.get(name) is None for name in names)


def _completions(value: object, field: str, location: Location) -> list[Step]:
    if value is not None and not isinstance(value, list):
        location.refuse(field, "a list of completions or null", value)
    return [
        _completion(completion, f"{field}[{number}]", location)
        for number, completion in enumerate(value or ())
    ]


def _completion(value: object, field: str, location: Location) -> Step:
    if not isinstance(value, dict):
        location.refuse(field, 'an object with "text" and "rating"', value)
    location.need_in(value, field, "text", "rating")
    rating = value["rating"]
    known = rating is None or (not isinstance(rating, bool) and rating in (1, 0, -1))
    if not known:
        location.refuse(f"{field}.rating", "1, 0, -1 or null", rating)
    return Step(location.step(value["text"], f"{field}.text"), _SIGNS.get(rating))


def read_prmbench(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a row of PRMBench: its modified solution.

    Raises:
        DataError: A field is wrong; the error names it (``error_steps[1]``).
    """
    asked = "modified_question" if "modified_question" in record else "question"
    location.need(record, asked, "modified_process", "error_steps")
    question = location.text(record[asked], asked)
    texts = location.listed(record["modified_process"], "modified_process", "steps")
    wrong = record["error_steps"]
    if not isinstance(wrong, list):
        location.refuse("error_steps", "a list of the numbers of steps", wrong)
    for place, number in enumerate(wrong):
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or not 1 <= number <= len(texts):
            expected = f"the number of a step, 1 to {len(texts)}"
            location.refuse(f"error_steps[{place}]", expected, number)
    steps = tuple(
        Step(location.step(text, f"modified_process[{place}]"), float(place + 1 not in wrong))
        for place, text in enumerate(texts)
    )
    kind, raw = location.name(record, "classification"), location.name(record, "idx")
    named = raw if kind is None or raw is None else f"{kind}_{raw}"
    used = (asked, "id", "idx", "modified_process", "error_steps", "classification", "group")
    return (
        StepExample(
            id=location.name(record, "id")
            or location.default_id(named, (question, *(step.text for step in steps))),
            question=question,
            images=(),
            steps=steps,
            domain=kind,
            group=location.name(record, "group"),
            extra=extra_of(record, used, idx=record.get("idx")),
        ),
    )
