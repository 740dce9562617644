"""A hub on loopback: as much of its protocol as creating, looking and committing take.

Written from the requests of huggingface_hub 2.4: create-repo, preupload, LFS batch with basic
transfer, commit in lines of JSON. It holds what it is sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """Repositories of a server: their branches with files, and whether they are private."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    fails_at: str | None = None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: Any, status: int = 200, **headers: str) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_any(self) -> None:
            path, body = self.path.partition("?")[0], self.body()
            hub.asked.append(f"{self.command} {path}")
            token = self.headers.get("Authorization")
            if not path.startswith("/lfs/") and token != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid token"}, 401)
            if hub.fails_at is not None and hub.fails_at in path:
                return self.answer({"error": "the disk of the hub is full"}, 507)
            for pattern, act in _ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    return act(self, hub, body, *found.groups())
            return self.answer({"error": f"unknown {self.command} {path}"}, 404)

        do_GET = do_POST = do_PUT = handle_any  # names of http.server

    return Handler


def _create(handler: Any, hub: Hub, body: bytes) -> None:
    asked = json.loads(body)
    name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
    assert "public" not in asked.values()
    hub.repos[name], hub.private[name] = {"main": {}}, asked.get("visibility") == "private"
    handler.answer({"url": f"{hub.url}/{name}"})


def _info(handler: Any, hub: Hub, _: bytes, name: str) -> None:
    if name not in hub.repos:
        handler.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return
    handler.answer({"id": name, "private": hub.private[name], "sha": "0" * 40, "tags": []})


def _tree(handler: Any, hub: Hub, _: bytes, name: str, revision: str) -> None:
    files = hub.repos[name][revision].items()
    handler.answer([{"type": "file", "path": p, "size": len(c), "oid": "1" * 40} for p, c in files])


def _branch(handler: Any, hub: Hub, _: bytes, name: str, branch: str) -> None:
    known = hub.repos[name]
    if branch in known:
        handler.answer({"error": "Reference already exists"}, 409)
        return
    known[branch] = dict(known["main"])
    handler.answer({})


def _valid(handler: Any, hub: Hub, body: bytes) -> None:
    handler.answer({"errors": [], "warnings": []})


def _preupload(handler: Any, hub: Hub, body: bytes, name: str, revision: str) -> None:
    files = json.loads(body)["files"]
    modes = [
        {
            "path": one["path"],
            "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
            "shouldIgnore": False,
        }
        for one in files
    ]
    handler.answer({"files": modes})


def _batch(handler: Any, hub: Hub, body: bytes, name: str) -> None:
    objects = [
        {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
        for one in json.loads(body)["objects"]
    ]
    handler.answer({"transfer": "basic", "objects": objects})


def _object(handler: Any, hub: Hub, body: bytes, oid: str) -> None:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.objects[oid] = body
    handler.answer({})


def _commit(handler: Any, hub: Hub, body: bytes, name: str, revision: str) -> None:
    lines = [json.loads(line) for line in body.splitlines()]
    files = hub.repos[name][revision]
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
    hub.commits.append({"repo": name, "revision": revision, **lines[0]["value"]})
    url = f"{hub.url}/{name}/commit/{'c' * 40}"
    handler.answer({"commitUrl": url, "commitOid": "c" * 40, "success": True})


_NAME, _REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.%-]+)"
_ROUTES = (
    (r"POST /api/repos/create", _create),
    (r"POST /api/validate-yaml", _valid),
    (rf"GET /api/models/{_NAME}", _info),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}", _tree),
    (rf"POST /api/models/{_NAME}/branch/{_REVISION}", _branch),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", _preupload),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", _commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /lfs/([0-9a-f]{64})", _object),
)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that serves on a free port of the loopback address while the body runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
