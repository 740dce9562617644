"""Every format: a malformed file is read to valid examples, or refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prm.data.reader import checked_rows, read_jsonl
from prm.data.splitter import solution_steps, split_steps
from prm.evaluation.answers import answer_classes
from prm.evaluation.final_answer import final_answer
from prm.inputs.collate import Collator
from prm.inputs.prompt import PromptEncoder
from prm.names import FORMAT_NAMES
from prm.schema import DataError, StepExample
from recipes.embedded.vocabulary import build_tokenizer
from tests.fuzz.checks import check_examples, check_refusal, read_rows
from tests.fuzz.strategies import TEXTS, files
from tests.fuzz.trial import attempt, fuzzed
from tests.prm.data.formats.good_records import GOOD

ALL = list(GOOD.values())


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "data.jsonl"


@pytest.fixture(scope="module")
def collator() -> Collator:
    return Collator(PromptEncoder(build_tokenizer(), system_prompt=None))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_formats(path, format):
    @fuzzed()
    @given(files([GOOD[format]]))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = attempt(format, lambda: read_rows(path, format), (DataError,))
        if isinstance(found, DataError):
            check_refusal(found, path)
        else:
            ids = [example.id for example in found]
            check_examples([e for e in found if ids.count(e.id) == 1], path)

    run()


def test_any_format(path, collator):
    """Format by its look, every check on, then the text laid out for a model."""

    def read() -> list[StepExample]:
        examples = [e for row in checked_rows(path, check_images="decode") for e in row.examples]
        for example in examples:
            if not example.images:
                collator([example])
        return examples

    @fuzzed()
    @given(files(ALL))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = attempt("auto", read, (DataError,))
        if isinstance(found, DataError):
            assert found.expected
        else:
            check_examples(found, path)

    run()


def test_own_reader(path):
    @fuzzed()
    @given(files([{**GOOD["prm-jsonl"], "images": []}]))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = attempt("read_jsonl", lambda: read_jsonl(path), (DataError,))
        if isinstance(found, DataError):
            check_refusal(found, path)
        else:
            check_examples(found, path)

    run()


def test_text_tools():
    """Splitting keeps every character; answers are compared; whatever the text."""

    def read(text: str, other: str) -> Any:
        assert "".join(split_steps(text)) == text
        assert all(step.strip() for step in solution_steps(text))
        return answer_classes([text, other, final_answer(text)])

    pieces = st.sampled_from(TEXTS) | st.text(max_size=30)

    @fuzzed()
    @given(st.lists(pieces, max_size=4).map("".join), pieces)
    def run(text: str, other: str) -> None:
        attempt("text", lambda: read(text, other), ())

    run()
