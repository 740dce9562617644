"""Solutions whose steps were judged by rollouts: how many continuations ended right.

- ``visualprm-raw`` (VisualPRM400K-v1.1-Raw): ``{"image", "question", "steps_with_score": [{"step",
  "score", "num_mc_correct", "num_mc_total"}]}``. The label is K / N. After the first step without a
  right continuation nothing was sampled (0 of 0); such steps have no label, whereas VisualPRM's
  converter writes "-". ``extra["trials"]`` holds N.
- ``math-aps`` (openr's tree search): ``{"question", "final_answer", "reasoning_steps"}``, which is
  a tree ``{"text", "mc_value", "children"}`` that starts with the question, or the list of its
  nodes ``{"solution_prefix", "mc_value"}``, each the whole text up to there; older files have
  ``{"q", "states": [{"state", "mcs"}]}``, without the question in the states. Every leaf is a
  solution: its steps are what the nodes on the way to it add, its labels their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prm.data.formats.agreement import agree_with_counts
from prm.data.formats.turns import question_text
from prm.data.record_fields import Location, Words, domain_key, extra_of
from prm.schema import Step, StepExample

_COUNTS = ("num_mc_correct", "num_mc_total")
_USED = ("id", "image", "images", "question", "steps_with_score", "group")


def matches_visualprm_raw(record: Mapping[str, Any]) -> bool:
    """Whether the record has steps with scores."""
    return "steps_with_score" in record


def matches_math_aps(record: Mapping[str, Any]) -> bool:
    """Whether the record is a question with the tree of its solutions."""
    return {"question", "reasoning_steps"} <= record.keys() or {"q", "states"} <= record.keys()


def read_visualprm_raw(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return the example of a row of VisualPRM400K-v1.1-Raw.

    Raises:
        DataError: A field is wrong; the error names it (``steps_with_score[3].num_mc_total``).
    """
    location.need(record, "question", "steps_with_score")
    images = location.images(record, "image", "images")
    question = question_text(record, "question", len(images), location)
    steps, trials = [], []
    given = location.listed(record["steps_with_score"], "steps_with_score", "steps")
    for number, step in enumerate(given):
        field = f"steps_with_score[{number}]"
        if not isinstance(step, dict):
            location.refuse(field, 'an object such as {"step": ..., "score": 0.5}', step)
        if "step" not in step:
            location.refuse(f"{field}.step", "the field 'step'", Words("nothing"))
        if all(step.get(name) is not None for name in _COUNTS):
            counts = [step[name] for name in _COUNTS]
            label = location.label(counts, f"{field}.num_mc_correct")
            share, right, total = (
                (f"{field}.{name}", step.get(name)) for name in ("score", *_COUNTS)
            )
            agree_with_counts(share, right, total, location)
            trials.append(counts[1])
        else:
            label = location.label(step.get("score"), f"{field}.score")
            trials.append(None)
        steps.append(Step(location.step(step["step"], f"{field}.step").strip(), label))
    return (
        StepExample(
            id=location.own_id(record, (question, *(step.text for step in steps))),
            question=question,
            images=images,
            steps=tuple(steps),
            domain=location.name(record, domain_key(record)),
            group=location.name(record, "group"),
            extra=extra_of(
                record,
                (*_USED, domain_key(record)),
                trials=trials if any(trials) else None,
            ),
        ),
    )


@dataclass(frozen=True)
class _Node:
    """What a node of a tree adds to the text, its value, its field, and the node above it."""

    text: str
    value: object
    field: str
    parent: int | None


def read_math_aps(record: Mapping[str, Any], location: Location) -> tuple[StepExample, ...]:
    """Return one example per leaf of a tree of solutions.

    Raises:
        DataError: A field is wrong; the error names it (``reasoning_steps[3].mc_value``).
    """
    asked, key = ("q", "states") if "states" in record else ("question", "reasoning_steps")
    location.need(record, asked, key)
    question = location.text(record[asked], asked)
    given = record[key]
    nodes = _tree(given, key, location) if isinstance(given, dict) else None
    if nodes is None:
        nodes = _prefixes(location.listed(given, key, "nodes"), key, question, location)
    inner = {node.parent for node in nodes}
    raw = location.name(record, "id")
    extra = extra_of(record, ("id", asked, key, "group", domain_key(record)))
    examples: list[StepExample] = []
    for number, node in enumerate(nodes):
        if number in inner:
            continue
        steps: list[Step] = []
        at: _Node | None = node
        while at is not None:
            text = location.text(at.text.strip(), at.field)
            value = f"{at.field.rpartition('.')[0]}.{'mcs' if key == 'states' else 'mc_value'}"
            steps.append(Step(text, location.label(at.value, value)))
            at = None if at.parent is None else nodes[at.parent]
        steps.reverse()
        examples.append(
            StepExample(
                id=location.default_id(raw, (question, *(s.text for s in steps)), len(examples)),
                question=question,
                images=(),
                steps=tuple(steps),
                domain=location.name(record, domain_key(record)),
                group=location.name(record, "group"),
                extra=extra,
            )
        )
    if not examples:
        location.refuse(key, "at least one node behind the question", given, "remove the row")
    return tuple(examples)


def _tree(root: Mapping[str, Any], key: str, location: Location) -> list[_Node]:
    """Return the nodes below the question, each behind the one above it."""
    nodes: list[_Node] = []
    left: list[tuple[Any, str, int | None]] = [(root, key, None)]
    while left:
        node, field, parent = left.pop()
        if not isinstance(node, dict):
            location.refuse(field, 'an object with "text", "mc_value" and "children"', node)
        here = None
        if node is not root:
            location.need_in(node, field, "text", "mc_value")
            text = location.text(node["text"], f"{field}.text", blank=True)
            here = len(nodes)
            nodes.append(_Node(text, node["mc_value"], f"{field}.text", parent))
        below = enumerate(_children(node, field, location))
        left += [(child, f"{field}.children[{number}]", here) for number, child in below][::-1]
    return nodes


def _children(node: Mapping[str, Any], field: str, location: Location) -> list[Any]:
    children = node.get("children")
    if not isinstance(children, list):
        location.refuse(f"{field}.children", "a list of nodes", children)
    return children


def _prefixes(given: list[Any], key: str, question: str, location: Location) -> list[_Node]:
    """Return the nodes of a list of prefixes, without the question and without repetitions."""
    names = ("state", "mcs") if key == "states" else ("solution_prefix", "mc_value")
    texts: dict[tuple[str, str], tuple[object, str]] = {}
    for number, entry in enumerate(given):
        field = f"{key}[{number}]"
        if not isinstance(entry, dict):
            location.refuse(field, f"an object with {names[0]!r} and {names[1]!r}", entry)
        location.need_in(entry, field, *names)
        text = location.text(entry[names[0]], f"{field}.{names[0]}", blank=True)
        body = text if key == "states" else text.removeprefix(question)
        if body.strip():
            value = entry[names[1]]
            texts.setdefault((body, repr(value)), (value, f"{field}.{names[0]}"))
    first: dict[str, int] = {}
    for number, (body, _) in enumerate(texts):
        first.setdefault(body, number)
    lengths = sorted({len(body) for body in first}, reverse=True)
    nodes = []
    for (body, _), (value, field) in texts.items():
        starts = (body[:length] for length in lengths if length < len(body))
        above = next((start for start in starts if start in first), "")
        nodes.append(_Node(body[len(above) :], value, field, first[above] if above else None))
    return nodes
