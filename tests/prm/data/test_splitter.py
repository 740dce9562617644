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
    "quoted": ("> Step 1: a\n> more\n>> Step 2: b", ["> Step 1: a\n> more", ">> Step 2: b"]),
    "quoted with empty lines": (">\n> 1. a\n>\n> 2. b\n>", [">\n> 1. a\n>", "> 2. b\n>"]),
    "quoted paragraphs": ("> a\n>\n> b\n\nc", ["> a\n>", "> b", "c"]),
    "a quoted formula": ("> \\[\n> z\n>\n> \\]\n>\n> c", ["> \\[\n> z\n>\n> \\]\n>", "> c"]),
    "an inequality over two lines": ("we have x\n> 5 and y\nso z", ["we have x\n> 5 and y\nso z"]),
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
    "steps with gaps": (
        "Step 1: a\nb\nStep 3: c\n**Step 4:** d", ["Step 1: a\nb", "Step 3: c", "**Step 4:** d"]
    ),
    "steps that start again": (
        "Step 1: a\nStep 2: b\nStep 1: c\nStep 2: d",
        ["Step 1: a", "Step 2: b", "Step 1: c", "Step 2: d"],
    ),
    "steps in one line with gaps": ("Step 1: a. Step 3: b.", ["Step 1: a.", "Step 3: b."]),
    "a step named in another": (
        "Step 1: Read.\nStep 1 gave 3.\nStep 2: Add.",
        ["Step 1: Read.\nStep 1 gave 3.", "Step 2: Add."],
    ),
    "a later step named in one line": (
        "Step 1: a for Step 3: b. Step 2: c", ["Step 1: a for Step 3: b.", "Step 2: c"]
    ),
    "other marks of the number": (
        "Step #1: a\nStep 2. b\n[Step 4] c", ["Step #1: a", "Step 2. b", "[Step 4] c"]
    ),
    "nested list": (
        "1. first\n   1. sub one\n   2. sub two\n2. second\nAnswer: 1",
        ["1. first\n   1. sub one\n   2. sub two", "2. second", "Answer: 1"],
    ),
    "nested list of three": (
        "1. a\n  1) b\n  2) c\n  3) d\n2. e\n3. f",
        ["1. a\n  1) b\n  2) c\n  3) d", "2. e", "3. f"],
    ),
    "indented list": ("  1. a\n  2. b", ["1. a", "2. b"]),
    "one step a line": (
        "He eats 3.\nSo 16-3=13.\nThen 13*2=26.\n#### 26\n",
        ["He eats 3.", "So 16-3=13.", "Then 13*2=26.", "#### 26"],
    ),
    "one formula a line": ("x = 5\r\n2y = 3\r\n\\boxed{8}", ["x = 5", "2y = 3", "\\boxed{8}"]),
    "lines of one step": (
        "The prices:\nA - 950 Lt\n- B\n  - C\nSo A.",
        ["The prices:\nA - 950 Lt\n- B\n  - C", "So A."],
    ),
    "lines of a displayed formula": (
        "We get\n\\[\nx = 2\nY\n\\]\nThen\n$$\nA\nB\n$$\nSo 2.",
        ["We get\n\\[\nx = 2\nY\n\\]", "Then\n$$\nA\nB\n$$", "So 2."],
    ),
    "prose that an editor broke": (
        "We add the eggs of the\nfirst day. Then\nNext we stop.",
        ["We add the eggs of the\nfirst day. Then\nNext we stop."],
    ),
    "a formula that an editor broke": ("x = 3 +\n4\nSo 7.", ["x = 3 +\n4\nSo 7."]),
    "a blank line in a displayed formula": (
        "So\n$$\nx = 1\n\ny = 2\n$$\n\nThus 3.", ["So\n$$\nx = 1\n\ny = 2\n$$", "Thus 3."]
    ),
    "a blank line in brackets": (
        "So \\[\nx = 1\n\n1. y\n\n2. z\n\\]\n\nThus 3.",
        ["So \\[\nx = 1\n\n1. y\n\n2. z\n\\]", "Thus 3."],
    ),
    "a blank line in an environment": (
        "a\n\n\\begin{align*}\nx &= 1 \\\\[2pt]\n\ny &= 2\n\\end{align*}\n\nb",
        ["a", "\\begin{align*}\nx &= 1 \\\\[2pt]\n\ny &= 2\n\\end{align*}", "b"],
    ),
    "a formula that is never closed": ("$$\nx = 1\n\ny = 2\n\nz", ["$$\nx = 1", "y = 2", "z"]),
    "dollars of money": ("A costs $$5 now.\n\nB costs $$6.", ["A costs $$5 now.", "B costs $$6."]),
    "a list of steps in LaTeX": (
        "\\begin{enumerate}\n\\item a\n\n\\item b\n\\end{enumerate}",
        ["\\begin{enumerate}\n\\item a", "\\item b\n\\end{enumerate}"],
    ),
    "decimals at line starts": (
        "The value is\n3.5 and\n4.5 m", ["The value is\n3.5 and\n4.5 m"]
    ),
    "decimals that are steps": ("x is 5\n3.5*2 = 7\n7.5 > 7", ["x is 5", "3.5*2 = 7", "7.5 > 7"]),
    "decimals that count up": (
        "We have\n\n1.5 m and\n2.5 m\n\nin all.", ["We have", "1.5 m and\n2.5 m", "in all."]
    ),
    "tag alone": ("[Reasoning]\n", []),
    "nothing": (" \n ", []),
}  # fmt: skip


@pytest.mark.parametrize(("text", "steps"), CASES.values(), ids=CASES)
def test_steps(text, steps):
    assert solution_steps(text) == steps
    assert "".join(split_steps(text)) == text


HEADINGS = [
    *(
        "Schritt {}: a",
        "Étape {} : a",
        "E\u0301tape {} : a",
        "Paso {}: a",
        "Passo {} - a",
        "Etapa {}: a",
    ),
    *("Stap {}: a", "Steg {}: a", "**Krok {}:** a", "Шаг {}. a", "### Adım {}: a", "Bước {}: a"),
    *(
        "Langkah {}: a",
        "चरण {}: a",
        "第{}步：a",
        "第 {} 步 a",
        "步骤{}：a",
        "步驟 {}: a",
        "ステップ{}：a",
    ),
    *(
        "手順{}：a",
        "단계 {}: a",
        "{}단계: a",
        "الخطوة {}: a",
        "STEP {}: a",
        "Step: {}: a",
        "(Step {}) a",
    ),
]


@pytest.mark.parametrize("heading", HEADINGS)
def test_step_is_a_word_of_many_languages(heading):
    numbered = [heading.format(number) for number in (1, 2, 3)]
    assert solution_steps("\n".join(numbered)) == numbered


def test_chinese_numerals_count_steps():
    steps = [
        "第一步：读题。",
        "第二步：计算。",
        "第十步：检查。",
        "第十二步：验算。",
        "第二十步：答。",
    ]
    assert solution_steps("\n".join(steps)) == steps
    assert solution_steps("".join(steps[:2])) == steps[:2]


PIECES = st.sampled_from(
    ["Step 1:", "Step 2:", "step 3", "1. ", "2. ", "3) ", "4、", "3.5", "x = 4. ", "\n", "\n\n",
     " ", "Answer: ", "**", "### ", "[Reasoning]", "```", "\r\n", "\t", "- a", "\x0b", "\u2028",
     "Step 4:", "第1步：", "Schritt 2:", "   1. ", "So ", "so ", ",", "\\[", "\\]", "$$", "#### 2",
     "\n$$\n", "\\begin{align}", "\\end{align}", "\n\\[\n", " and\n"]
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
