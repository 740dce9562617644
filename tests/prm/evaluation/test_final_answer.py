"""The final answer of a solution, wherever and however it is stated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.evaluation.answers import answer_classes, canonical_answer
from prm.evaluation.final_answer import final_answer, without_remarks

STATED = {
    # within a box, brackets or a formula; behind it, marks of the end that a model writes
    r"so \boxed{\text{Answer: } 5}": "5",
    r"\boxed{\text{The answer is } 5}": "5",
    r"$\text{The answer is } \frac{1}{2}$": r"\frac{1}{2}",
    r"\textbf{Final Answer: B}": "B",
    r"It costs $3, and the answer is $x$": "$x$",
    "(Answer: 5)": "5",
    "So (the answer is [2, 5)).": "[2, 5)",
    "(a) Answer: (1, 2)": "(1, 2)",
    "The answer is $-\\boxed{5}$.": "-5",
    "Answer: 42</s>": "42",
    "Answer: 42<|eot_id|>": "42",
    "#### 42\n<end_of_turn>": "42",
    "Therefore, (B).<｜end▁of▁sentence｜>": "B",
    "the answer is 7</answer></s>": "7",
    "<|begin_of_box|>7<|end_of_box|><|im_end|>": "7",
    # "Answer" with a colon, in emphasis, as a heading, in other languages
    "a\n\nAnswer: B": "B",
    "Answer: A\nno,\nFinal answer: **3.5**.": "3.5",
    "**Answer:** B.": "B",
    "**Answer**: B": "B",
    "Answer:\n 12\nbecause": "12",
    "Answer:\n\n12": "12",
    "### Final Answer\n\n**73**": "73",
    "Final Answer: **73**": "73",
    "Ans: 5": "5",
    "Antwort: C": "C",
    "答案：丙": "丙",
    "答案是：丙": "丙",
    "ANSWER: A\nActually, ANSWER: B": "B",
    "Answer: $B": "$B",
    "Answer: *B*": "B",
    "Answer: B) 12 cm": "B) 12 cm",
    "Answer: St. Petersburg": "St. Petersburg",
    "Answer: Not possible": "Not possible",
    "Answer: correct": "correct",
    "Answer:\n$$\n\\frac{1}{2}\n$$\nas said": r"\frac{1}{2}",
    # In a sentence
    "The answer is: 145°": "145°",
    "so the answer is 12.": "12",
    "**The answer is 12**": "12",
    "The answer is therefore 5.": "5",
    "The answers are 3 and 4.": "3 and 4",
    "The answer to the question is 12 cm.": "12 cm",
    "The correct option is (C).": "(C)",
    "The answer is B. Note that A is too small.": "B",
    "The final answer is $[2, 5)$. I hope it is correct.": "$[2, 5)$",
    "Answer: C. A pretty girl": "C",
    "Answer: 5. So we are done": "5",
    "Answer: 1.5 m. The rest is air": "1.5 m",
    "The answer is 12, because 3 * 4 = 12.": "12",
    "The answer is B since A is wrong.": "B",
    "The answer would be 5.": "5",
    "The answer should be $17$.": "$17$",
    "We get the final answer of 12.": "12",
    "Answer = 5": "5",
    "We add.\nAns. 5": "5",
    "因此，答案为B。": "B",
    "故答案为：8．": "8",
    "The answer is: 70度。": "70度",
    "정답: 3": "3",
    "Answer:\n- B": "B",
    "Answer: B\nExplanation: the answer is not A.": "B",
    "Option A is wrong. Therefore, option B is correct.": "B",
    "(B) is the correct answer.": "B",
    # Tags
    "<answer>B</answer>": "B",
    "<think>Answer: 3</think>\n<answer> \\boxed{4} </answer>": "4",
    "<answer>The answer is 12 cm.</answer>": "12 cm",
    # Boxes
    "2+3 is 5.\n\nSo \\boxed{5}": "5",
    r"We get $\boxed{\frac{1}{\sqrt{2}}}$. Hence it is done.": r"\frac{1}{\sqrt{2}}",
    r"First \boxed{1}, then \fbox{2}.": "2",
    r"\boxed{\{1, 2\}}": r"\{1, 2\}",
    r"So $\boxed 7$.": "7",
    r"The answer is $\boxed{4}$.": "4",
    "Answer: The area is $\\boxed{12}$.": "12",
    r"\boxed{5}. This answer is correct.": "5",
    "\\boxed{3}\n\nWait. Answer: 4": "4",
    # As in GSM8K
    "He eats 3.\nSo 16-3=13.\n#### 26": "26",
    "#### 1,000 dollars": "1,000 dollars",
    "#### B": "B",
    "So 16-3=13.\nA: 26": "26",
    # Layout, lists, remarks, choices and tags, first the ones written before the rules
    "Answer:\n* 8": "8",
    "Answer:\n• -3": "-3",
    "Answer:\n1) 9": "9",
    "**Answer:**\n\n```text\n42\n```": "42",
    "Final Answer:\n***\n6": "6",
    "The answer is:\n> 5": "5",
    "Answer:\n$\n4\n$": "4",
    "Answer:\n\\begin{equation*}\n\\frac{1}{2}\n\\end{equation*}": r"\frac{1}{2}",
    "Answer:\n\\begin{aligned}\nx &= 2+3 \\\\\n&= 5\n\\end{aligned}": "5",
    "The answer is given below:\n\n12": "12",
    "The answers are as follows: 3 and 4": "3 and 4",
    "Answer: 5\n\nThe answer is rounded to two decimals.": "5",
    "\\boxed{5}\n\nThe answer is in cm.": "5",
    "Answer: B\n\nThe answer is based on the figure.": "B",
    "Thus, (D).": "D",
    "Hence, [C]": "C",
    "The correct choices are B and D.": "B and D",
    "Correct option: (C)": "(C)",
    "故选：B。": "B",
    "因此选 D": "D",
    "<final_answer>12</final_answer>": "12",
    "So <|begin_of_box|>A<|end_of_box|>": "A",
    "Answer:\n- x = 1\n- y = 2": "x = 1, y = 2",
    'He said "the answer is 5".': "5",
    "Answer: red\n": "red",
    "Answer: 5. Then he left. The answer is blue.": "blue",
    "Answer: - 5": "- 5",
    "Answer:\n- 5": "5",
    "Answer:\n-5": "-5",
    "Answer:\n1. B": "B",
    "Answer:\n1. B\n2. C": "1. B, 2. C",
    "Answer:\n```\n5\n```": "5",
    "Answer: ```5```": "5",
    "Final Answer:\n---\n5": "5",
    "Answer:\n\\begin{align}\nx=5\n\\end{align}": "x=5",
    "Answer:\n\\begin{gather}\nx=5 \\\\\ny=6\n\\end{gather}": "x=5, y=6",
    "Answer:\n\\begin{pmatrix}1\\\\2\\end{pmatrix}": r"\begin{pmatrix}1\\2\end{pmatrix}",
    "Answer:\n\\begin{equation}\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}\\end{equation}": (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
    ),
    "Answer:\n\\begin{pmatrix}\n1\n\\end{pmatrix}\nas said": r"\begin{pmatrix} 1 \end{pmatrix}",
    "Answer:\n\\begin{itemize}\n\\item 3\n\\item 4\n\\end{itemize}": "3, 4",
    "The answer is the following:\n\n$$7$$": "7",
    "The answer is shown below.\n\n5": "5",
    "The final answer is as follows: 5": "5",
    "The answers are as follows:\n(a) 3\n(b) 4": "(a) 3, (b) 4",
    "Answer: A) 5\nC) 7": "A) 5, C) 7",
    "Answer: B) 5\nA) is too small.": "B) 5",
    "Answer:\n- B\n- because 3 < 4": "B",
    "The answer is given by $x=5$.": "$x=5$",
    "Answer: 5\nNote: answer is rounded": "5",
    "Answer: 5\n\nThe answer is in meters.": "5",
    "Final answer: 12\n\n(The answer is exact.)": "12",
    "The answer is 7. The answer is simplified.": "7",
    "The answer is approximately 5.2.": "approximately 5.2",
    "The answer is in Paris.": "in Paris",
    "Therefore, (B).": "B",
    "So the correct options are A and C.": "A and C",
    "Correct choice: B": "B",
    "故选 C。": "C",
    "<answer>B</answer> or <final_answer>C</final_answer>": "C",
    "[ANSWER]5[/ANSWER]": "5",
    "The answer is > 5.": "> 5",
    # A reply of one word
    "D": "D",
}
NOT_STATED = [
    "no statement at all", "Answer:", "", r"cut off \boxed{5", r"\boxed{}", "#### Step 1: begin",
    "#### Introduction\ntext and more", "A: 12\nB: 13", "A: 12\nand on it goes",
    "It is not so that option B is correct", "Neither A nor option B is correct.",
    "I cannot see it. The answer is: ...",
    "The answer should be checked.", "So the answer is not A.", "<answer> </answer>",
    "Answer: see above", "Answer: see the figure", "The answer is as follows",
    "Therefore, (B) is too small.", "The answer is not known.",
    "So the answer is correct.", "He answered: 5",
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer"), STATED.items())
def test_a_final_answer_is_found(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", NOT_STATED)
def test_where_none_is_stated_there_is_none(text):
    assert final_answer(text) is None


# Written, with three more that are not joined, before the rules that join them.
SAME_ANSWER = [
    ("Therefore, the answer must be (B).", "B"),
    ("Thus the correct answer choice is C.", "C"),
    ("So, my final choice: D", "D"),
    ("My answer: 7", "7"),
    ("Final answer -> 12", "12"),
    ("We add.\n**Final Answer** 12", "12"),
    ("Hence B is the right option.", "B"),
    ("Therefore, option (C).", "C"),
    ("Hence, options B and D.", "B, D"),
    ("So the right answers are A, C.", "A and C"),
    ("因此正确选项是 B。", "B"),
    ("所以选择 C", "C"),
    ("本题选D。", "D"),
    ("故正确答案为 A", "A"),
    ("Die Antwort ist B.", "B"),
    ("La respuesta es C.", "C"),
    ("La réponse est 12.", "12"),
    ("Thus <|begin_of_box|>\\frac{1}{2}<|end_of_box|>", "0.5"),
    ("Work.\n<final_answer>\nB\n</final_answer>", "B"),
    ("<|begin_of_box|>(B) 12 cm<|end_of_box|>", "B"),
    ("The answer is approximately 5.2.", "5.2"),
    ("Answer: 5 (approximately)", "5"),
    ("Answer: approx. 3.14", "3.14"),
    ("Answer: about 40 degrees", "40 degrees"),
    ("So \\boxed{\\approx 5.2}", "5.2"),
    ("The final answer is below:\n\n8", "8"),
    ("So we choose (B).", "B"),
    ("Therefore, I choose option D.", "D"),
    ("The correct answer: option A.", "A"),
    ("Thus, the answer would be option (C).", "C"),
    ("Therefore, the correct choice is:\n\n(B)", "B"),
]
OTHER_ANSWER = [
    ("Therefore, (B) is too small, so (C).", "B"),
    ("So (B) and (C) remain.", "B"),
    ("We choose A = 5 as the base.", "A"),
    ("The answer is not (B).", "B"),
    ("Correct choice: not B", "B"),
    ("So the correct options are A and C.", "A"),
    ("故不选 C。", "C"),
    ("因此排除选项 B", "B"),
    ("The answer is about the area.", "area"),
    ("Answer: about 40", "41"),
    ("Answer: approximately 5.2", "5.21"),
    ("Answer: 5 (approximately 5.2)", "5.2"),
    ("Answer: between 3 and 5", "3 and 5"),
    ("Answer: more than 5", "5"),
    ("Answer: at least 5", "5"),
    ("Answer: almost 5", "5"),
    ("Answer: around the corner", "the corner"),
    ("Answer: B, C", "B"),
    ("Answer: B, 12 cm", "12 cm"),
    ("Answer: C, D major", "C"),
    ("Answer: A, 5, B", "A"),
    ("So the options are A, B, C and D.", "A, B, C, D"),
    ("The possible choices: A, B, C, D.\nAnswer: C", "A, B, C, D"),
    ("<final_answer>5</final_answer>", "55"),
    ("Die Antwort ist nicht B.", "B"),
    ("La respuesta es correcta.", "correcta"),
    ("So we choose (B) or (C).", "B"),
    ("Hence, options B and D are wrong.", "B, D"),
    ("Option B is correct if x > 0.", "B"),
    ("Therefore, option (C) is wrong.", "C"),
    ("本题不选D。", "D"),
    ("Answer: ≈ 5 cm", "5 m"),
    ("Therefore, I choose not to use option D.", "D"),
    ("We choose B because A was excluded, but B fails. So C is the correct answer.", "B"),
    ("The answer is about 5 times 3.", "5"),
    ("Answer: approximately equal", "equal"),
]

# Behind the rules, aimed at them.
SAME_ANSWER += [("Answer: $x \\approx 5.2$", "x = 5.2"), ("Answer: 5 (rounded to one digit)", "5")]
SAME_ANSWER += [
    ("So the final answer is (B) $\\frac{1}{2}$.", "B"),
    ("Answer: $(C) \\frac{1}{2}$", "C"),
    ("Answer: \\text{(D) } \\dfrac{3}{4}", "D"),
    ("Answer: B) \\frac{1}{2}", "B"),
    ("I think the answer is C, not D.", "C"),
    ("The answer is (A) (not B or C).", "A"),
]
OTHER_ANSWER += [
    ("Answer: (B)\\frac{1}{2}", "B"),  # without a space it is a product
    ("Answer: (x) \\frac{1}{2}", "1/2"),
    ("Answer: (K) \\frac{1}{2}", "1/2"),
    ("Answer: A (B) \\frac{1}{2}", "B"),
    ("Answer: not C, D", "D"),
    ("Answer: C, not D", "D"),
    ("Answer: C, not 5", "C"),
    ("Answer: A not B", "A"),
    ("Answer: A and not B", "A"),
    ("Answer: A, but not only B", "A"),
    ("Answer: x, not y", "x"),
    ("Answer: π ≈ 3.14", "3.14"),
    ("Answer: e ≈ 2.718", "2.718"),
    ("Answer: √27 ≈ 5.196", "5.196"),
    ("Answer: not ≈ 5", "5"),
    ("Answer: x ≈ 5", "y ≈ 5"),
    ("Answer: about 5 or 6", "5"),
    ("Answer: about half", "half"),
    ("The answer should be a number.", "A"),
    ("La respuesta es a partir de 5.", "A"),
    ("We choose A and B are left.", "A"),
    ("Therefore, the answer A or B.", "A"),
]


@pytest.mark.parametrize(("text", "answer"), SAME_ANSWER)
def test_a_conclusion_votes_with_its_answer(text, answer):
    stated, given = answer_classes([final_answer(text), answer])
    assert stated == given is not None


@pytest.mark.parametrize(("text", "answer"), OTHER_ANSWER)
def test_other_conclusions_do_not(text, answer):
    stated, given = answer_classes([final_answer(text), answer])
    assert stated != given


def test_sentences_behind_an_answer_are_removed_and_decimals_are_not():
    assert without_remarks("B. Note that A is small") == "B"
    assert without_remarks("$3.5$ m. It is") == "$3.5$ m"
    for text in ("3.5", "C. a pretty girl", "J. K. Rowling", "12 cm", "U.S. Army"):
        assert without_remarks(text) == text


@given(st.text(max_size=60))
def test_any_text_is_searched(text):
    answer = final_answer(text)
    assert answer is None or answer.strip()


def test_votes_agree_over_all_ways_to_state_an_answer():
    said = [r"So \boxed{\frac{7}{2}}", "#### 3.5", "The answer is 7/2. I hope so", "A: 3.50"]
    assert {canonical_answer(final_answer(text)) for text in said} == {"7/2"}
