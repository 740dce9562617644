"""``bilevel-prm serve`` as a process, and what is refused before it serves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import torch

from prm.models.model import save_prm
from recipes import commands
from recipes.options.values import OptionError
from recipes.serve.options import TOKEN, ServeOptions
from recipes.serve.server import bound, token_of
from tests.prm.tiny import internvl, told

BODY = {"question": "what is one plus two", "steps": ["one plus two is three"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("server") / "model"
    save_prm(told(internvl(dtype=torch.float32)), {}, path)
    return path


def post(url: str) -> dict:
    request = urllib.request.Request(
        f"{url}/score", json.dumps(BODY).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        return json.load(answer)


def test_a_signal_ends_the_server_when_all_is_answered(model):
    """Requests of eight threads are inside when SIGTERM comes; each gets scores, or no connection.

    The first of them is the proof that it serves.
    """
    pytest.importorskip("fastapi", reason="the extra serve (fastapi) is not installed")
    pytest.importorskip("uvicorn", reason="the extra serve (uvicorn) is not installed")
    words = [sys.executable, "-m", "recipes", "serve", "--model", str(model), "--port", "0"]
    server = subprocess.Popen(
        [*words, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(": serving ")[0]
        assert url.startswith("http://127.0.0.1:")
        first = post(url)
        found: list[dict] = []
        refused: list[int] = []
        some = threading.Semaphore(0)

        def ask() -> None:
            while True:
                try:
                    found.append(post(url))
                except urllib.error.HTTPError as error:
                    error.close()  # it holds the connection, and outlives the thread
                    refused.append(error.code)
                    return
                except OSError:  # the server does not listen any more
                    return
                finally:
                    some.release()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(16):
            assert some.acquire(timeout=120)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        _, said = server.communicate(timeout=120)
    finally:
        server.kill()
    assert server.returncode == 128 + signal.SIGTERM
    assert all(answer["steps"] == 1 for answer in (first, *found))
    assert set(refused) <= {503}
    (last,) = said.splitlines()
    assert last.startswith("bilevel-prm serve: ended by SIGTERM; requests answered: ")
    counts = dict(reversed(part.split(" x ")) for part in last.split(": ")[-1].split(", "))
    assert int(counts["200"]) == len(found) + 1  # no answer was lost on its way
    assert set(counts) <= {"200", "503"}


def test_an_address_that_others_reach_needs_a_token():
    with pytest.raises(OptionError, match="other machines reach it, and there is no token"):
        bound("0.0.0.0", 0, has_token=False)
    bound("0.0.0.0", 0, has_token=True).close()
    for host in ("127.0.0.1", "127.1.2.3", "localhost"):
        bound(host, 0, has_token=False).close()
    with pytest.raises(OptionError, match="--host no such name"):
        bound("no such name", 0, has_token=True)


def test_a_port_that_is_taken_is_named():
    with bound("127.0.0.1", 0, has_token=False) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"--port {port}: Address already in use"):
            bound("127.0.0.1", port, has_token=False)


def test_the_token_comes_from_the_option_or_the_environment(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    assert token_of(None) is None
    monkeypatch.setenv(TOKEN, "from-environment")
    assert token_of(None) == "from-environment"
    assert token_of("given") == "given"
    for bad in ("", "two words", "tok\u00e9n", "line\n"):
        with pytest.raises(OptionError, match="--token: expected a token of printable") as error:
            token_of(bad)
        assert bad == "" or bad not in str(error.value)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch, capsys, model):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert commands.run("serve", ServeOptions(model=str(model), port=0)) == 1
    said = capsys.readouterr().err
    assert "is not installed: pip install 'bilevel-prm[serve]'" in said
    assert len(said.splitlines()) == 1


def test_a_model_that_does_not_say_how_it_is_asked_is_refused(tmp_path, capsys):
    pytest.importorskip("fastapi", reason="the extra serve (fastapi) is not installed")
    save_prm(internvl(dtype=torch.float32), {}, tmp_path / "model")
    assert commands.run("serve", ServeOptions(model=str(tmp_path / "model"), port=0)) == 2
    assert "expected a model that says how it is asked" in capsys.readouterr().err
