"""What is asked and what is said in chat messages of every form."""

from __future__ import annotations

import pytest

from prm.rewards.chats import content_of, question_of, solution_of

URL = "data:image/png;base64,AA=="


def test_the_question_is_what_others_than_the_system_say():
    assert question_of("what is one") == ("what is one", [])
    system, user = ({"role": role, "content": f"by {role}"} for role in ("system", "user"))
    assert question_of([system, user]) == ("by user", [])
    assistant = {"role": "assistant", "content": "two"}
    assert question_of([user, assistant, user]) == ("by user\n\ntwo\n\nby user", [])


def test_pictures_are_taken_from_parts_of_every_form():
    parts = [
        {"type": "image"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "b.png"},
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": URL},
        {"type": "text", "text": "what "},
        {"type": "text", "text": "is one"},
    ]
    assert question_of([{"role": "user", "content": parts}]) == (
        "what is one",
        ["a.png", "b.png", URL, URL],
    )


def test_a_solution_is_what_the_assistant_says():
    assert solution_of("one") == "one"
    said = [
        {"role": "assistant", "content": "one"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
    ]
    assert solution_of(said[:1]) == "one"
    assert solution_of(said[:3]) == "one\n\ntwo"
    assert solution_of([]) == solution_of(said[3:]) == ""


@pytest.mark.parametrize(
    "part", [{"type": "audio"}, {"type": "text"}, 3, {"type": "text", "text": 1}]
)
def test_other_parts_are_refused(part):
    with pytest.raises(ValueError, match='as parts of type "text" or "image", found'):
        content_of({"role": "user", "content": [part]})
