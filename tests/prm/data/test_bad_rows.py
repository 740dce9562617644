"""What is left out of a file is counted in rows, listed, and never more than a share."""

from __future__ import annotations

import json

import pytest

from prm.data.bad_rows import BadRows, write_bad_rows
from prm.data.reader import checked_rows, read_rows
from prm.schema import DataError


def own(number: int, text: str = "s", **more) -> dict:
    return {"id": f"r{number}", "question": "q?", "steps": [{"text": text}], **more}


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_rows_are_left_out_and_the_lines_of_the_others_kept(tmp_path):
    rows = [own(1), own(2, " "), "{broken", own(1), own(5, images=["none.png"]), own(6)]
    path = write(tmp_path / "a.jsonl", *rows)
    bad = BadRows(path, "skip", 0.7)
    examples, lines = read_rows(path, bad_rows=bad)
    assert ([example.id for example in examples], lines) == (["r1", "r6"], [1, 6])
    assert [(row.line, row.field, row.id) for row in bad.left_out] == [
        (2, "steps[0].text", None), (3, None, None), (4, "id", "r1"), (5, "images[0]", "r5"),
    ]  # fmt: skip
    assert (bad.rows, bad.lost) == (6, 4.0)
    assert str(bad) == f"{path}: 4 of 6 rows (66.7 %) left out"
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert (caught.value.line, caught.value.field) == (2, "steps[0].text")


def test_a_candidate_is_left_out_alone_and_counts_as_its_share_of_the_row(tmp_path):
    texts = ["", "Answer: A", "x = 2", " "]
    many = {
        "id": "q",
        "question": "Q?",
        "candidates": texts,
        "true_false": [False, True, "?", True],
    }
    path = write(tmp_path / "a.jsonl", many, many | {"id": "p", "true_false": [True] * 4})
    bad = BadRows(path, "skip", 0.7)
    examples, lines = read_rows(path, bad_rows=bad)
    assert [example.id.partition("#")[0] for example in examples] == ["q", "p", "p"]
    assert [example.answer for example in examples] == ["A", "A", ""]
    assert lines == [1, 2, 2]
    assert [(row.line, row.field) for row in bad.left_out] == [
        (1, "candidates[0]"), (1, "true_false[2]"), (1, "candidates[3]"),
        (2, "candidates[0]"), (2, "candidates[3]"),
    ]  # fmt: skip
    assert (bad.rows, bad.lost) == (2, 3 / 4 + 2 / 4)


def test_a_row_without_a_usable_candidate_counts_once(tmp_path):
    nothing = {"question": "Q?", "candidates": ["", " "], "true_false": [True, True]}
    path = write(tmp_path / "a.jsonl", nothing, nothing | {"candidates": ["x", "y"]})
    bad = BadRows(path, "skip")
    assert len(read_rows(path, bad_rows=bad)[0]) == 2
    assert (bad.rows, bad.lost) == (2, 1.0)


@pytest.mark.parametrize(
    ("most", "wrong", "refused"),
    [(0.1, 2, False), (0.1, 3, True), (0.0, 1, True), (0.01, 1, False), (1.0, 19, False)],
)
def test_more_than_a_share_is_refused_and_a_single_row_never(tmp_path, most, wrong, refused):
    path = write(tmp_path / "a.jsonl", *[own(n, "s" if n >= wrong else " ") for n in range(20)])
    bad = BadRows(path, "skip", most)
    if not refused:
        assert len(read_rows(path, bad_rows=bad)[0]) == 20 - wrong
        return
    with pytest.raises(DataError) as caught:
        read_rows(path, bad_rows=bad)
    error = caught.value
    assert error.file == path
    assert error.expected == f"at most {most:.3g} of the rows to be left out"
    assert error.found.startswith(
        f"{wrong} of 20 rows ({5 * wrong}.0 %); the first is line 1, field"
    )
    assert "--max-bad-rows" in error.remedy


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", own(1, " "))
    why = (
        r"found none in 1 rows, all left out; the first is line 1, field steps\[0\]\.text: expected"
    )
    with pytest.raises(DataError, match=why):
        list(checked_rows(path, bad_rows=BadRows(path, "skip", 1.0)))


def test_the_list_names_file_line_field_and_reason(tmp_path):
    path = write(tmp_path / "a.jsonl", own(1), own(2, " "))
    bad = BadRows(path, "skip", 0.5)
    read_rows(path, bad_rows=bad)
    write_bad_rows(tmp_path / "list.jsonl", [bad])
    assert [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()] == [
        {
            "file": str(path),
            "line": 2,
            "field": "steps[0].text",
            "id": None,
            "reason": "expected a string that is not blank, found the string ' '",
        }
    ]
