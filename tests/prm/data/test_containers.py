"""Rows are the same however they are packed, and what holds no rows is called by its name."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile

import pyarrow
import pytest
from pyarrow import feather, parquet

from prm.data import containers
from prm.data.json_rows import json_rows
from prm.data.reader import iter_rows, read_examples
from prm.schema import DataError
from recipes.__main__ import main
from tests.prm.data.packings import LINES, NUMBERED, PACKED, ROWS, TEXTS, table_file


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("pack", [bytes, *PACKED.values()], ids=["plain", *PACKED])
def test_rows_are_the_same_however_they_are_packed(tmp_path, text, pack):
    path = tmp_path / "rows.anything"
    path.write_bytes(pack(text))
    assert list(json_rows(path)) == NUMBERED


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_tables_hold_the_same_rows(tmp_path, kind):
    path = table_file(tmp_path / "rows.anything", ROWS, kind)
    assert list(json_rows(path)) == NUMBERED
    assert [row.line for row in iter_rows(path)] == list(range(1, 301))


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_an_error_in_a_table_names_row_and_field(tmp_path, kind):
    rows = [dict(row) for row in ROWS]
    rows[99] = rows[99] | {"steps": [{"text": " ", "label": "+"}]}
    path = table_file(tmp_path / "rows.table", rows, kind)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert (caught.value.file, caught.value.line) == (path, 100)
    assert caught.value.field == "steps[0].text"


def test_columns_that_are_null_count_as_absent_and_values_are_those_of_json(tmp_path):
    date, number = pyarrow.scalar("2024-01-02").cast(pyarrow.date32()), pyarrow.decimal128(4, 2)
    table = pyarrow.table(
        {
            "a": pyarrow.array([None, "x"]),
            "d": pyarrow.array([date.as_py(), None]),
            "n": pyarrow.array(["1.50", None]).cast(number),
            "s": pyarrow.array([{"k": [1, None]}, None]),
            "b": pyarrow.array([b"\x89PNG", None]),
            "i": pyarrow.array([{"bytes": b"\x89PNG", "path": None}, None]),
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    picture = {"bytes": b"\x89PNG", "path": None}
    assert list(json_rows(tmp_path / "x.parquet")) == [
        (1, {"d": "2024-01-02", "n": 1.5, "s": {"k": [1, None]}, "b": picture, "i": picture}),
        (2, {"a": "x"}),
    ]


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
def test_compressed_data_that_end_too_early_are_named_behind_the_rows_before(tmp_path, pack):
    path = tmp_path / "rows.packed"
    whole = pack(LINES)
    path.write_bytes(whole[: len(whole) // 2])
    *rows, (line, error) = json_rows(path)
    assert rows == NUMBERED[: len(rows)]
    assert isinstance(error, DataError)
    assert (error.file, error.line) == (path, line)
    assert error.expected in ("a complete file", "JSON")  # a decoder may just end


@pytest.mark.parametrize("pack", [PACKED["gz"], PACKED["bz2"], PACKED["xz"]])
def test_damaged_data_are_named(tmp_path, pack):
    path = tmp_path / "rows.packed"
    whole = bytearray(pack(LINES))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    errors = [value for _, value in json_rows(path) if isinstance(value, DataError)]
    assert errors[-1].expected == "a complete file"


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
def test_cut_tables_are_named(tmp_path, kind):
    path = table_file(tmp_path / "rows.table", ROWS, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *_, (_, error) = json_rows(path)
    assert isinstance(error, DataError)
    assert error.expected == "a complete file"


def stream_of(rows: list[dict]) -> bytes:
    """An Arrow stream with three rows a batch."""
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file.getvalue()


def test_all_streams_of_a_file_are_read(tmp_path):
    path = tmp_path / "rows.arrow"
    others = [{"id": name, "extra": 1} for name in "xyz"]
    path.write_bytes(stream_of(ROWS[:7]) + stream_of(others) + stream_of(ROWS[7:8]))
    assert [value for _, value in json_rows(path)] == [*ROWS[:7], *others, ROWS[7]]


END_MARK = b"\xff\xff\xff\xff\0\0\0\0"
WHOLE = stream_of([{"n": -1}, {"n": 0}])  # its last batch ends with bits of its end mark
CUT = {
    "without its end mark": WHOLE.removesuffix(END_MARK),
    "the second without its end mark": WHOLE + WHOLE.removesuffix(END_MARK),
    "within the end mark": WHOLE[:-4],
    "with other bytes behind": WHOLE + b"junk" * 9,
    "with zeros behind": WHOLE + bytes(64),
}


@pytest.mark.parametrize("content", CUT.values(), ids=CUT)
def test_a_stream_that_does_not_end_where_it_should_is_named_behind_its_rows(tmp_path, content):
    path = tmp_path / "rows.arrow"
    path.write_bytes(content)
    *rows, (line, error) = json_rows(path)
    assert [value for _, value in rows] in ([{"n": -1}, {"n": 0}], [{"n": -1}, {"n": 0}] * 2)
    assert isinstance(error, DataError)
    assert (error.file, error.line, error.expected) == (path, len(rows) + 1, "a complete file")
    assert line == error.line


def test_a_stream_that_is_cut_between_two_batches_is_named(tmp_path):
    path = tmp_path / "rows.arrow"
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(ROWS[:4])
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, 2))
        cut = file.tell()
        writer.write_table(table.slice(2))
    path.write_bytes(file.getvalue()[:cut])
    assert len([row for row in iter_rows(path) if not isinstance(row, DataError)]) == 2
    with pytest.raises(DataError, match="Arrow stream that ends before its end mark"):
        read_examples(path)


@pytest.mark.parametrize("write", [parquet.write_table, feather.write_feather])
@pytest.mark.parametrize("inside", [False, True])
def test_a_name_of_two_columns_or_fields_is_refused_as_in_json(tmp_path, write, inside):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, ["question", "question"])
    if inside:
        struct = pyarrow.StructArray.from_arrays(columns, ["question", "question"])
        table = pyarrow.table({"held": pyarrow.array([[]], pyarrow.list_(struct.type))})
    write(table, tmp_path / "x")
    ((line, error),) = json_rows(tmp_path / "x")
    assert isinstance(error, DataError)
    assert (line, error.line, error.expected) == (1, 1, "every key once")
    assert "'question' twice" in error.found


def zip_of(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", data)
    return file.getvalue()


def tar_of(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


UNLIKE = {
    "csv": (b"id,question,answer\n1,what?,2\n" * 9, "a table of separated values (CSV", "pandas"),
    "quoted csv": (b'"id","question"\n"1","what, now?"\n' * 9, "with the first line", "pandas"),
    "tsv": (b"id\tquestion\n1\twhat?\n" * 9, "a table of separated values", "JSON object per"),
    "zip": (zip_of(LINES), "a ZIP archive", "unpack it"),
    "tar": (tar_of(LINES), "a tar archive", "unpack it"),
    "tar.gz": (gzip.compress(tar_of(LINES)), "a tar archive", "unpack it"),
    "utf-16": (LINES.decode().encode("utf-16"), "a UTF-16 byte order mark", "-f UTF-16 "),
    "utf-16-le": (LINES.decode().encode("utf-16-le"), "UTF-16 without a mark", "-f UTF-16LE "),
    "utf-16-be": (LINES.decode().encode("utf-16-be"), "UTF-16 without a mark", "-f UTF-16BE "),
    "utf-16, far letters": (
        '{"\u6f22\u5b57": 1}\n'.encode("utf-16-le"), "UTF-16 without a mark", "-f UTF-16LE ",
    ),
    "utf-32": (LINES.decode().encode("utf-32"), "a UTF-32 byte order mark", "-f UTF-32 "),
    "utf-32-le": (LINES.decode().encode("utf-32-le"), "UTF-32 without a mark", "-f UTF-32LE "),
    "utf-32-be": (LINES.decode().encode("utf-32-be"), "UTF-32 without a mark", "-f UTF-32BE "),
    "utf-32-be, a mark": (
        ("\ufeff" + LINES.decode()).encode("utf-32-be"), "a UTF-32 byte order mark", "-f UTF-32 ",
    ),
    "utf-16 in gzip": (
        gzip.compress(LINES.decode().encode("utf-16")), "a UTF-16 byte order mark", "-f UTF-16 ",
    ),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs"),
    "html": (b"<!DOCTYPE html>\n<html>\n</html>\n", "a web page (HTML)", "download"),
    "binary": (bytes(range(256)) * 9, "binary data", "JSON object per line"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "found", "remedy"), UNLIKE.values(), ids=UNLIKE)
def test_what_holds_no_rows_is_named_once(tmp_path, capsys, content, found, remedy):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    ((line, error),) = json_rows(path)
    assert (line, error.line) == (1, 1)
    assert found in error.found
    assert remedy in error.remedy
    assert main(["data", "validate", str(path)]) == 1
    said = capsys.readouterr().out
    assert said.count(error.found) == 1
    assert "1 rows" in said


def test_one_indented_object_with_a_mistake_is_one_error(tmp_path):
    path = tmp_path / "pretty.json"
    path.write_text(json.dumps({"u1": [{"Question": "x"} for _ in range(50)]}, indent=2)[:-8] + ",")
    ((row, error),) = json_rows(path)
    assert (row, error.expected) == (1, "JSON")
    assert error.remedy == "write one complete JSON object per line"


@pytest.mark.parametrize(
    ("package", "content"),
    [("zstandard", PACKED["zst"](LINES)), ("pyarrow", b"PAR1" + b"x" * 99)],
)
def test_the_extra_that_reads_a_container_is_named(tmp_path, monkeypatch, capsys, package, content):
    path = tmp_path / "rows.packed"
    path.write_bytes(content)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert main(["data", "validate", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"{package}, which is not installed: pip install 'bilevel-prm[datasets]'" in said


def test_a_table_is_held_a_few_rows_at_a_time(tmp_path, monkeypatch):
    path = table_file(tmp_path / "x.arrow", ROWS, "arrow stream")
    plain, made = containers._plain, []
    monkeypatch.setattr(containers, "_plain", lambda value: made.append(1) or plain(value))
    next(json_rows(path))
    assert len(made) < 50
