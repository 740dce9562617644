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


@pytest.mark.parametrize(("first", "second"), APART)
def test_what_may_mean_something_else_is_not_the_same(first, second):
    assert words_of(first) != words_of(second)


SAME = [("１＋１＝？", "1+1=?"), ("ﬁnd x", "find x"), ("ｱ", "ア"), ("Which\u3000one", "which one")]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_full_and_half_width_and_ligatures_are_the_same(first, second):
    assert words_of(first) == words_of(second)


def test_pictures_count_by_content_and_order(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).write_bytes(content)
    shutil.copy(tmp_path / "a", tmp_path / "copy")
    key = Questions().key

    def of(*names):
        images = tuple(tmp_path / name for name in names)
        return key(StepExample("x", "See?", images, (Step("s"),)))

    assert of("a", "b") == of("copy", "b")
    assert len({of("a"), of("b"), of("a", "b"), of("b", "a"), of(), of("gone")}) == 6
