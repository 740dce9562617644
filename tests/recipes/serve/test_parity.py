"""Scores of other servers beside ours: stubs on loopback that answer as vLLM and SGLang do.

The stubs compute by the model itself, without the parts of the library that score: the logits of
the whole prompt, of which they take the softmax by themselves. They were written from the sources
that ``recipes.serve.remote`` names, and are not those servers.
"""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
import torch
from PIL import Image

from prm.models.model import PRM, load_prm, save_prm
from recipes import commands
from recipes.serve.options import ParityOptions
from recipes.serve.remote import _from_likely
from tests.prm.tiny import internvl, llama, save_image, told

ROWS = [
    {"question": "what is one plus two", "steps": ["one plus two", "is three", "three"]},
    {"question": "what is two plus two", "steps": ["four"]},
]


class Stub:
    """Answers as vLLM or SGLang does; ``skew`` is added to the log-odds of every label."""

    def __init__(self, prm: PRM) -> None:
        self.prm = prm
        self.skew = 0.0
        self.likeliest = 40
        self.asked: list[dict] = []
        self.break_with: dict | None = None

    def logits(self, ids: list[int], pixels=None) -> torch.Tensor:
        more = {} if pixels is None else {"pixel_values": pixels}
        with torch.no_grad():
            logits = self.prm.model(input_ids=torch.tensor([ids]), **more).logits[0].double()
        logits[:, self.prm.plus_id] += self.skew
        return logits

    def answer(self, path: str, body: dict) -> dict:
        self.asked.append(body)
        if self.break_with is not None:
            return self.break_with
        return {
            "/generative_scoring": self.generative,
            "/v1/score": self.sglang,
            "/v1/chat/completions": self.chat,
        }[path](body)

    def _labels(self, body: dict) -> list[list[float]]:
        assert body["item_first"] is False
        found = []
        for item in body["items"]:
            assert item
            last = self.logits(body["query"] + item)[-1]
            if body["apply_softmax"]:
                last = last[body["label_token_ids"]].softmax(0)
            else:
                last = last.softmax(0)[body["label_token_ids"]]
            found.append(last.tolist())
        return found

    def generative(self, body: dict) -> dict:
        items = [
            {"index": n, "object": "score", "score": plus}
            for n, (plus, _) in enumerate(self._labels(body))
        ]
        return {"object": "list", "model": body["model"], "data": items[::-1]}

    def sglang(self, body: dict) -> dict:
        return {"object": "scoring", "model": body["model"], "scores": self._labels(body)}

    def chat(self, body: dict) -> dict:
        text, pixels = "", None
        for message in body["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                pixels, content = self._shown(content)
            text += f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
        assert body["add_generation_prompt"] is False
        ids = self.prm.tokenizer(text, add_special_tokens=False)["input_ids"]
        logs = self.logits(ids, pixels).log_softmax(-1)
        entries: list[dict | None] = [None]
        for place in range(1, len(ids)):
            row = logs[place - 1]
            likely = row.topk(min(self.likeliest, len(row))).indices.tolist()
            chosen = dict.fromkeys([ids[place], *likely])
            entries.append({str(token): {"logprob": float(row[token])} for token in chosen})
        return {"prompt_token_ids": ids, "prompt_logprobs": entries, "choices": []}

    def _shown(self, content: list[dict]):
        """The pixels of the one picture, and the text with its tokens."""
        shown, said = content
        raw = base64.b64decode(shown["image_url"]["url"].split(",")[1])
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        pixels = self.prm.image_processor(
            images=[image], crop_to_patches=True, max_patches=3, return_tensors="pt"
        )["pixel_values"].to(torch.float32)
        tokens = "<img>" + "<IMG_CONTEXT>" * 4 * len(pixels) + "</img>\n"
        return pixels, tokens + said["text"]


@pytest.fixture
def serve():
    """Start a stub on loopback and return its address; it ends with the test."""
    started = []

    def start(stub: Stub) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                content = json.dumps(stub.answer(self.path, json.loads(raw))).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and a file each: of text alone, and with pictures."""
    made = {}
    for name, make in (("text", llama), ("pictures", internvl)):
        path = tmp_path_factory.mktemp(name)
        prm = told(make(dtype=torch.float32))
        save_prm(prm, {}, path / "model")
        save_image(path / "wide.png", 100, 60, seed=1)
        images = {"images": ["wide.png"] if name == "pictures" else []}
        rows = [{"id": f"s{n}", "labels": None, **images, **row} for n, row in enumerate(ROWS)]
        (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made[name] = path
    return made


@pytest.fixture
def compare(folders, serve, capsys):
    """Return a stub and ``run(api)``, the status of the command and what it says."""

    def on(name: str):
        folder = folders[name]
        stub = Stub(load_prm(folder / "model"))
        paths = {"model": str(folder / "model"), "file": str(folder / "rows.jsonl")}
        url = serve(stub)

        def run(api: str, **more) -> tuple[int, str]:
            options = {"server": url, **paths, "threads": 1, **more}
            status = commands.run("parity", ParityOptions(api=api, **options))
            return status, "".join(capsys.readouterr())

        return stub, run

    return on


@pytest.mark.parametrize(
    ("name", "api"),
    [("text", "vllm"), ("text", "sglang"), ("text", "vllm-chat"), ("pictures", "vllm-chat")],
)
def test_scores_agree_and_a_skewed_server_is_seen(compare, name, api):
    stub, run = compare(name)
    status, said = run(api, tolerance=1e-5)
    assert status == 0, said
    assert f"({api}): 4 steps of 2 solutions, largest difference " in said
    stub.skew = 1.0
    status, said = run(api)
    assert status == 1
    largest = float(said.split("largest difference ")[1].split()[0])
    ours = float(said.split("ours ")[1].split(",")[0])
    theirs = float(said.split("theirs ")[1].split(")")[0])
    odds = math.log(theirs / (1 - theirs)) - math.log(ours / (1 - ours))
    assert odds == pytest.approx(1.0, abs=1e-3)
    assert largest == pytest.approx(theirs - ours, abs=1e-3)


def test_every_item_ends_at_a_label(compare):
    stub, run = compare("text")
    run("vllm", served_model="mine")
    first, second = stub.asked
    assert first["model"] == "mine"
    assert (len(first["items"]), len(second["items"])) == (3, 1)
    plus, minus = map(stub.prm.tokenizer.convert_tokens_to_ids, "+-")
    assert first["label_token_ids"] == [plus, minus]
    for item, following in pairwise(first["items"]):
        assert following[: len(item)] == item
        assert following[len(item)] == plus


def test_pictures_are_not_asked_for_with_token_ids(compare):
    stub, run = compare("pictures")
    status, said = run("vllm")
    assert status == 2
    assert "asks with token ids alone, and solution 's0' has pictures; use --api vllm-chat" in said
    assert stub.asked == []


def test_another_prompt_is_named_by_its_first_token(compare):
    stub, run = compare("text")
    stub.break_with = {"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None] * 3}
    status, said = run("vllm-chat")
    assert status == 1
    assert "its prompt differs from ours at token" in said
    assert "the chat template, the system prompt and the number of tiles" in said


@pytest.mark.parametrize(
    "answer",
    [{}, {"data": []}, {"data": [{"index": 0, "score": 2}] * 3}, {"data": 3}, {"data": [3]}],
)
def test_an_answer_of_another_form_is_shown(compare, answer):
    stub, run = compare("text")
    stub.break_with = answer
    status, said = run("vllm")
    assert status == 1
    assert "/generative_scoring: expected the step scores of a solution, found" in said
    assert json.dumps(answer) in said


def test_a_label_that_is_not_among_the_likeliest_gives_a_bound(folders):
    usage = load_prm(folders["text"] / "model").usage
    plus, minus = str(usage.plus_id), str(usage.minus_id)
    likely = {plus: {"logprob": math.log(0.6)}, "7": {"logprob": math.log(0.2)}}
    low, high = _from_likely(likely, usage)
    assert low == pytest.approx(0.75)
    assert high == 1.0
    likely[minus] = {"logprob": math.log(0.3)}
    assert _from_likely(likely, usage) == pytest.approx((2 / 3, 2 / 3))


def test_bounds_are_counted_and_no_difference_within_them(compare):
    stub, run = compare("text")
    stub.likeliest = 1
    status, said = run("vllm-chat", tolerance=1)
    assert status == 0
    assert "a bound alone is known" in said


def test_a_server_that_is_not_there_is_named(compare):
    _, run = compare("text")
    status, said = run("vllm", server="http://127.0.0.1:9")
    assert status == 1
    assert "http://127.0.0.1:9/generative_scoring: no answer" in said
    status, said = run("vllm", server="file:///etc")
    assert status == 2
    assert "expected http://... or https://..." in said
