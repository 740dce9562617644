"""Standard streams that go away, fill up or know few characters; control characters escaped."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys

import pytest
from tqdm import tqdm

from recipes.__main__ import main
from recipes.terminal import printable, say, standard_streams, write_bytes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 中文, 👩‍👩‍👧, e\u0301", "plain, größer, 中文, 👩‍👩‍👧, e\u0301"),
        ("\x00\x07\x1b[31m\x7f", "\\x00\\x07\\x1b[31m\\x7f"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x85\x9b31m\u2028\u2029", "\\x85\\x9b31m\\u2028\\u2029"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        (7, "7"),
    ],
)
def test_control_characters_are_escaped(text, shown, capsys):
    assert printable(text) == shown
    say(str(text))
    assert capsys.readouterr().out == shown + "\n"


def test_every_control_character_is_escaped():
    kept = {code for code in range(0x250) if printable(chr(code)) == chr(code)}
    assert kept == {*range(0x20, 0x7F), *range(0xA0, 0x250)}


def test_a_page_keeps_its_lines_and_json_its_characters(capsys):
    content = {"a": "\x7f\x1b\x9b\n"}
    with standard_streams():
        print("one\n\ttwo\x1b[2J")
        print(json.dumps(content))
    page, tab, found = capsys.readouterr().out.splitlines()
    assert (page, tab) == ("one", "\ttwo\\x1b[2J")
    assert json.loads(found) == content


def test_a_progress_bar_moves_its_cursor_and_a_message_does_not(capsys):
    with standard_streams():
        for _ in tqdm(range(2), desc="evil\x1b[2J", ascii=True, mininterval=0):
            pass
        print("message \r\x1b[A\x1b[2J", file=sys.stderr)
    found = capsys.readouterr().err
    assert found.startswith("\revil\\x1b[2J: ")
    assert found.endswith("message \\r\\x1b[A\\x1b[2J\n")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "gr\\xf6\\u4e2d\n"), ("latin1", "grö\\u4e2d\n")]
)
def test_characters_that_the_stream_lacks_are_escaped(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with standard_streams():
        print("grö中")
        write_bytes("grö中\n".encode())
    assert stream.buffer.getvalue() == shown.encode(encoding) + "grö中\n".encode()


@pytest.fixture
def unread(monkeypatch):
    """Standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    yield
    stream.close()  # raises if it still leads into the pipe


def test_where_nobody_reads_the_work_goes_on(unread, capsys):
    worked = []
    with standard_streams():
        for step in range(3):
            print("x" * 100_000)
            worked.append(step)
        write_bytes(b"x" * 100_000)
    assert worked == [0, 1, 2]
    assert capsys.readouterr().err == ""


def closed_pipe(*words: str) -> subprocess.CompletedProcess[str]:
    """A command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "recipes", *words]
    try:
        return subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run größer"
    folder.mkdir()
    (folder / "args.yaml").write_text("steps: 3\n")
    return folder


def test_a_closed_pipe_ends_quietly_with_the_usual_status(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "question": "q", "steps": [{"text": "s", "label": "+"}]}\n')
    for words, status in (
        (["--help"], 0),
        (["--version"], 0),
        (["runs", "show", str(run), "--json"], 0),
        (["runs", "list", str(tmp_path)], 0),
        (["data", "validate", str(rows)], 0),
        (["data", "validate", str(rows), "--json", "-"], 0),
        (["data", "validate", str(rows), "--format", "stepwise"], 1),
    ):
        done = closed_pipe(*words)
        assert done.returncode == status, words
        if words[-1] != "-":  # the page, which goes to standard error then
            assert done.stderr == "", words


@pytest.mark.parametrize(
    ("buffered", "who"), [("", "bilevel-prm: "), ("1", "bilevel-prm runs show: ")]
)
def test_a_full_standard_output_is_an_error_in_one_line(run, tmp_path, buffered, who):
    """It is noticed at the end, or where the stream has no buffer, at once."""
    with (tmp_path / "out").open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "recipes", "runs", "show", str(run), "--json"],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": buffered},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    assert done.returncode == 1
    assert done.stderr == f"{who}standard output: File too large\n"


def test_a_terminal_of_ascii_is_enough(run):
    done = subprocess.run(
        [sys.executable, "-m", "recipes", "runs", "show", str(run)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout.splitlines()[0].endswith("run gr\\xf6\\xdfer: train, stopped")
    assert done.stderr == ""


def test_without_standard_output_a_command_works(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["runs", "show", str(run)]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_bytes(b"lost")


def test_the_streams_are_those_from_before_afterwards():
    before = sys.stdout, sys.stderr
    with standard_streams():
        inside = sys.stdout
        assert inside.encoding == before[0].encoding
    assert inside is not before[0]
    with pytest.raises(ZeroDivisionError), standard_streams():
        raise ZeroDivisionError
    assert main(["runs", "show", "nowhere"]) == 2
    assert (sys.stdout, sys.stderr) == before
