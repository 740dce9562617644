"""The weights of a run in the terminal, as a table, and as a column of the data file."""

from __future__ import annotations

import csv
import json

import pytest

from recipes.__main__ import main
from tests.recipes.report.run_directory import LABELS, SOURCES, WEIGHTS, write_data, write_run


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


@pytest.fixture
def run(tmp_path, data):
    return write_run(tmp_path / "run", data)


def test_the_page_has_both_ends_groups_and_every_example_in_a_bar(run, capsys):
    assert main(["weights", str(run), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # (Σ w)² / (n Σ w²) = 36 / (6 · 8.375)
    assert lines[0].endswith("6 weights, 0.250 to 2.000, mean 1.000, effective sample size 72%")
    ends = [line.split() for line in lines if line.strip().startswith(("1 ", "2 "))]
    assert [(row[1], row[4].strip(",")) for row in ends] == [
        ("2.000", "e2"), ("1.500", "e0"), ("0.250", "e4"), ("0.500", "e5"),
    ]  # fmt: skip
    (judge,) = (line.split() for line in lines if line.startswith("judge"))
    assert judge[1:] == ["3", "1.583", "1.300", "1.500", "1.900"]
    assert any(line.startswith("sum") for line in lines)
    first = next(n for n, line in enumerate(lines) if line.split() == ["weight", "examples"])
    assert sum(int(line.split()[2]) for line in lines[first + 1 :]) == 6


def test_learned_labels_are_counted_and_have_no_sample_size(tmp_path, data, capsys):
    run = write_run(tmp_path / "labels", data, **{"labels.jsonl": LABELS})
    assert main(["weights", str(run), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("6 weights, 0.250 to 2.000, mean 1.000")
    start = next(n for n, line in enumerate(lines) if line.startswith("learned labels: "))
    assert lines[start].startswith("learned labels: 4 of 12 were turned over; a weight is 1 minus")
    assert lines[start + 2].split() == ["1", "1", "0.000", "1", "e0"]


def test_without_the_data_file_the_page_says_what_is_missing(run, data, capsys):
    data.unlink()
    assert main(["weights", str(run)]) == 0
    assert f"not shown, the data file {data} is not there; give --data" in capsys.readouterr().out


def test_tables_hold_every_column_and_origin(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("w.csv", "w.parquet"):
        assert main(["weights", str(run), "--export", str(tmp_path / name)]) == 0
    with (tmp_path / "w.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["weight"]) for row in rows] == list(WEIGHTS)
    table = parquet.read_table(tmp_path / "w.parquet").to_pydict()
    assert table["source"] == list(SOURCES) == [row["source"] for row in rows]
    assert set(table) == {"id", "weight", "visits", "initial_loss", "domain", "source"}


def annotated(run, target, *words):
    return main(["weights", str(run), "--annotate", str(target), *words])


def test_of_a_jsonl_file_only_the_new_field_is_written(run, data, tmp_path):
    assert annotated(run, tmp_path / "with.jsonl", "--column", "w") == 0
    before = data.read_bytes().splitlines(keepends=True)
    after = (tmp_path / "with.jsonl").read_bytes().splitlines(keepends=True)
    for old, new, weight in zip(before, after, WEIGHTS, strict=True):
        assert new == old.replace(b"} \r\n", b', "w": %s} \r\n' % str(weight).encode())


def test_arrays_and_tables_keep_their_form(data, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    table = pyarrow.Table.from_pylist(rows)
    array, columns, arrow = (data.parent / f"t.{end}" for end in ("json", "parquet", "arrow"))
    array.write_text(json.dumps(rows))
    parquet.write_table(table, columns, row_group_size=4)
    with ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    for source in (array, columns, arrow):
        target = tmp_path / f"with-{source.name}"
        assert annotated(write_run(tmp_path / source.suffix, source), target) == 0
        if source is array:
            found = json.loads(target.read_text())
        elif source is columns:
            found = parquet.read_table(target).to_pylist()
        else:
            with ipc.open_file(target) as reader:
                found = reader.read_all().to_pylist()
        expected = [row | {"weight": weight} for row, weight in zip(rows, WEIGHTS, strict=True)]
        assert found == expected


def test_every_row_and_every_weight_is_accounted_for(run, data, tmp_path, capsys):
    target = tmp_path / "with.jsonl"
    lines = data.read_text().splitlines(keepends=True)

    def refused(text: str, *words: str) -> str:
        data.write_text(text)
        assert annotated(run, target, *words) != 0
        assert not target.exists()
        return capsys.readouterr().err

    assert "1 missing, for example 'e5'" in refused("".join(lines[:-1]))
    more = lines[0].replace('"e0"', '"e9"')
    assert ":7: expected an example of the run, once, found 'e9'" in refused("".join(lines) + more)
    data.write_text("".join(lines))
    assert "found 'source' already" in refused("".join(lines), "--column", "source")


def test_rows_that_the_run_left_out_have_no_weight(data, tmp_path, capsys):
    bad = json.dumps({"id": "bad", "question": "q", "steps": []})
    data.write_text(bad + "\n" + data.read_text())
    run = write_run(tmp_path / "run", data)
    (run / "train.skipped.jsonl").write_text(json.dumps({"line": 1, "field": "steps"}) + "\n")
    assert annotated(run, tmp_path / "with.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "with.jsonl").read_text().splitlines()]
    assert [row["weight"] for row in rows] == [None, *WEIGHTS]
    assert "7 rows, 6 with weights, 1 without a weight" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(run, data, tmp_path, capsys):
    target = tmp_path / "with.jsonl"
    target.write_text("mine")
    assert annotated(run, target) == 2
    assert target.read_text() == "mine"
    assert annotated(run, data, "--overwrite") == 2
    assert "is a file that is read" in capsys.readouterr().err
    assert annotated(run, target, "--overwrite") == 0
    assert main(["weights", str(run), "--export", str(tmp_path / "w.xlsx")]) == 2
    assert main(["weights", str(run), "--column", "w"]) == 2
    assert "no effect without --annotate" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights.jsonl", "extreme_weights.jsonl", "log.jsonl"])
def test_files_of_the_run_are_never_replaced(run, name, capsys):
    (run / name).touch()
    before = (run / name).read_bytes()
    assert annotated(run, run / name, "--overwrite") == 2
    assert "is a file that is read" in capsys.readouterr().err
    assert (run / name).read_bytes() == before


def test_the_data_file_is_not_replaced_by_the_table(run, data, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "data.parquet"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    before = table.read_bytes()
    words = ["weights", str(run), "--data", str(table), "--export", str(table), "--overwrite"]
    assert main(words) == 2
    assert "is a file that is read" in capsys.readouterr().err
    assert table.read_bytes() == before


@pytest.mark.parametrize("name", ["copy.jsonl.gz", "copy.parquet"])
def test_the_copy_has_no_name_of_another_kind(run, tmp_path, name, capsys):
    assert annotated(run, tmp_path / name) == 2
    assert "what is written is plain JSON" in capsys.readouterr().err
    assert not (tmp_path / name).exists()
