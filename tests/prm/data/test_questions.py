"""The same question, however it is written and wherever its pictures lie."""

from __future__ import annotations

import shutil
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data.questions import Questions, words_of
from prm.schema import Step, StepExample


@given(st.text())
def test_case_space_and_unicode_form_do_not_count(text):
    words = words_of(text)
    for form in ("NFC", "NFD"):
        assert words_of(unicodedata.normalize(form, text)) == words
    assert words_of(text.casefold()) == words
    assert words_of(f" \t{text}\n\u200b") == words
    assert words_of("\u00a0".join(text.split())) == words


APART = [("x^2", "x2"), ("x\u00b2", "x2"), ("1 0", "10"), ("a-b", "ab"), ("5", "-5")]
APART += [
    ("½", "1/2"),
    ("①", "1"),
    ("<image 1> or <image 2>", "<image 2> or <image 1>"),
    ("<b>", "b"),
    ("<image 2> Q", "Q"),
    ("<image 1> and <image 1>", "<image> and <image>"),
]


@pytest.mark.parametrize(("first", "second"), APART)
def test_what_may_mean_something_else_is_not_the_same(first, second):
    assert words_of(first) != words_of(second)


SAME = [
    ("１＋１＝？", "1+1=?"),
    ("ﬁnd x", "find x"),
    ("ｱ", "ア"),
    ("Which\u3000one", "which one"),
    ("𝑥 = 𝟏?", "x = 1?"),
    ("𝛂 + ℎ", "α + h"),
    ("\ufe8e\ufedf", "\u0627\u0644"),  # Arabic letters in the form of their place
    ("<image> Q", "Q"),
    ("<image>\n\nQ", "Q\n<image>"),
    ("What is é <image>?", "What is é ?"),
    ("<image 1> Q", "Q"),
    ("<image_1>Q <image_2>", "<image> Q <image>"),
    ("What’s “x”?", 'What\'s "x"?'),
    ("−5 – x", "-5 - x"),
    ("f′(x) is x‑1", "f'(x) is x-1"),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_other_forms_of_a_character_and_marks_of_pictures_are_the_same(first, second):
    assert words_of(first) == words_of(second)


UNSEEN = [0x00, 0x7F, 0xAD, 0x34F, 0x61C, 0x180E, 0x200B, 0x200D, 0x202A, 0x202E, 0x2061, 0x2064]
UNSEEN += [0x2066, 0x2069, 0xFE00, 0xFE0F, 0xFEFF, 0xE0041, 0xE0100, 0xE01EF]


@pytest.mark.parametrize("code", UNSEEN)
@pytest.mark.parametrize("word", ["word", "wörd"])
def test_what_nobody_sees_does_not_count(code, word):
    unseen = chr(code)
    assert words_of(f"{unseen}a {word[:2]}{unseen}{word[2:]}{unseen}") == ["a", word]


def test_what_is_seen_counts():
    for code in range(0x3000):
        if unicodedata.category(chr(code))[0] in "NPS" or chr(code).isalpha():
            assert words_of(chr(code)) or code in (0x115F, 0x1160), hex(code)


def test_pictures_count_by_content_and_order(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).write_bytes(content)
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    key = Questions().key

    def of(*names, question="See?"):
        images = tuple(tmp_path / name for name in names)
        return key(StepExample("x", question, images, (Step("s"),)))

    for question in ("<image> See?", "See?<image>", "See\ufe0f?\u2069"):
        assert of("a", question=question) == of("a")

    assert of("a", "b") == of("copy", "b")
    assert len({of("a"), of("b"), of("a", "b"), of("b", "a"), of(), of("gone")}) == 6
