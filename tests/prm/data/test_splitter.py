"""No character is lost; cuts stand where steps start, and numbers in prose start none."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prm.data.splitter import solution_steps, split_steps

CASES = {
    "step lines": (
        "Let us see.\n\nStep 1: Read.\n   - a\n\nstill step 1\nStep 2: Add.\n\nFinal answer: 7\n",
        ["Let us see.", "Step 1: Read.\n   - a\n\nstill step 1", "Step 2: Add.", "Final answer: 7"],
    ),
    "headings": ("### Step 1: a\nb\n\n**Step 2:** c", ["### Step 1: a\nb", "**Step 2:** c"]),
    "in one line": (
        "Step 1: a. Step 2: b, as in Step 1: c. Step 3: d",
        ["Step 1: a.", "Step 2: b, as in Step 1: c.", "Step 3: d"],
    ),
    "numbered": ("1. a\n2. b\n3) c", ["1. a", "2. b", "3) c"]),
    "numbered and paragraphs": (
        "We find x.\n\n1. a\n\n   b\n2. c\n\n- d\n\nTherefore e.",
        ["We find x.", "1. a\n\n   b", "2. c\n\n- d", "Therefore e."],
    ),
    "chinese": ("1、甲\n2、乙\n\n答案：丙", ["1、甲", "2、乙", "答案：丙"]),
    "blank lines": ("a = 3.5\nb\n\n\nc\r\n\r\nd", ["a = 3.5\nb", "c", "d"]),
    "official layout": (
        "[Reasoning]\n1. A shows 3. 5 apples\n\n2. So x = 4. Then y = 5.\n\nAnswer: B",
        ["1. A shows 3. 5 apples", "2. So x = 4. Then y = 5.", "Answer: B"],
    ),
    "numbers in prose": ("So x = 4. Then y = 5.", ["So x = 4. Then y = 5."]),
    "number at a line start": ("3. 5 apples,\n3.5 per head", ["3. 5 apples,\n3.5 per head"]),
    "a single item": ("1. The only one,\nand 2. The rest", ["1. The only one,\nand 2. The rest"]),
    "abbreviations": ("e.g. 2. The other,\n\ni.e. 3. This", ["e.g. 2. The other,", "i.e. 3. This"]),
    "decimals in a list": ("1. 2.5 + 1\n2. = 3.5", ["1. 2.5 + 1", "2. = 3.5"]),
    "code": ("a\n```\n1. x\n\n2. y\n```\n\nb", ["a\n```\n1. x\n\n2. y\n```", "b"]),
    "answer in emphasis": ("a\n**Answer:** B", ["a", "**Answer:** B"]),
    "one word": ("D", ["D"]),
    "tag alone": ("[Reasoning]\n", []),
    "nothing": (" \n ", []),
}  # fmt: skip


@pytest.mark.parametrize(("text", "steps"), CASES.values(), ids=CASES)
def test_steps(text, steps):
    assert solution_steps(text) == steps
    assert "".join(split_steps(text)) == text


PIECES = st.sampled_from(
    ["Step 1:", "Step 2:", "step 3", "1. ", "2. ", "3) ", "4、", "3.5", "x = 4. ", "\n", "\n\n",
     " ", "Answer: ", "**", "### ", "[Reasoning]", "```", "\r\n", "\t", "- a", "\x0b", "\u2028"]
)  # fmt: skip


@given(st.lists(PIECES | st.text(max_size=8)).map("".join))
@example("Step 1: a Step 2: b\n\nAnswer: c")
def test_no_character_is_lost(text):
    steps = split_steps(text)
    assert "".join(steps) == text
    assert all(step.strip() for step in steps) or steps == [text]
    kept = "".join("".join(solution_steps(text)).split())
    assert kept in ("".join(text.split()), "".join(text.split())[len("[Reasoning]") :])


@given(st.integers(0, 999), st.integers(0, 99), st.sampled_from([".", ")", "、"]))
def test_numbers_inside_a_line_never_cut_it(first, second, mark):
    text = f"So x = {first}{mark} Then y = {second}{mark} and z = {first}.{second}"
    assert split_steps(text) == [text]
