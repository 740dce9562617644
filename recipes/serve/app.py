"""The server as an ASGI application: ``POST /score``, ``GET /health``, ``GET /metrics``.

It takes at most so many requests at a time (``most_requests``), which bounds what it holds in
memory: that number times ``Limits.body``. More are told to come again (429).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response

from prm.rewards.scorer import Judgement
from prm.schema import DataError
from recipes.serve.batching import Batcher, Judge, Judged
from recipes.serve.metrics import CONTENT_TYPE, Metrics
from recipes.serve.requests import Asked, Limits, read_request
from recipes.serve.schema import answer_schema, request_schema

_JOIN_SECONDS = 5.0
_GONE = 499
"""The status that servers log for a client that has closed its connection."""


class Refused(Exception):
    """A request that gets another answer than scores.

    Attributes:
        status: The HTTP status.
        message: What is wrong.
        field: The field of the request that is at fault, or None.
    """

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(status, message, field)
        self.status, self.message, self.field = status, message, field


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server treats its clients.

    Attributes:
        limits: The most that one request may bring.
        most_requests: The largest number of requests that are read, wait or are scored at a time.
        seconds: How long a request may take before it is answered 504 and dropped.
        grace: How long requests that are inside may go on once the server closes.
        token: The token that clients must show, or None.
    """

    limits: Limits = Limits()
    most_requests: int = 64
    seconds: float = 60.0
    grace: float = 30.0
    token: str | None = None


class Service:
    """The state of a running server; only the event loop touches it.

    Args:
        scorer: What scores.
        settings: How clients are treated.
        at_once: The largest number of solutions that are scored together.
        about: What ``/health`` tells of the model.
    """

    def __init__(
        self, scorer: Judge, settings: Settings, at_once: int, about: Mapping[str, Any]
    ) -> None:
        self.settings = settings
        self.about = about
        self.metrics = Metrics()
        self.batcher = Batcher(scorer, at_once)
        self.is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the scoring thread while the server runs."""
        self._loop = asyncio.get_running_loop()
        self.batcher.start()
        yield
        self.is_closing = True
        await asyncio.to_thread(self.batcher.stop, _JOIN_SECONDS)

    def close(self) -> None:
        """Take no more requests; those that are inside have ``Settings.grace`` seconds.

        It may be called by any thread, and by the handler of a signal.
        """
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        if not self.is_closing and self._loop is not None:
            self.is_closing = True
            self._loop.call_later(self.settings.grace, self._over.set)

    async def answer(self, request: Request) -> Response:
        """Answer ``POST /score``."""
        started = time.perf_counter()
        status = 500  # where an error of the program leaves the handler
        try:
            response = _json(200, await self._scores(request))
            status = 200
        except Refused as refused:
            response = _refusal(refused)
            status = refused.status
        finally:
            self.metrics.answers[status] += 1
            self.metrics.seconds += time.perf_counter() - started
        if self.is_closing:  # or the client sends its next request into a closed connection
            response.headers["Connection"] = "close"
        return response

    async def _scores(self, request: Request) -> Mapping[str, Any]:
        ends = asyncio.get_running_loop().time() + self.settings.seconds
        self.check_token(request)
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"expected Content-Type: application/json, found {kind or 'none'}")
        if self.is_closing:
            raise _closing()
        if self.metrics.inside >= self.settings.most_requests:
            # The body is read, not kept: a connection that is closed over it loses the answer.
            await _body(request, self.settings.limits.body, ends, kept=False)
            raise Refused(429, f"{self.settings.most_requests} requests are waiting; come again")
        self.metrics.inside += 1
        try:
            raw = await _body(request, self.settings.limits.body, ends)
            try:
                asked = await asyncio.to_thread(read_request, raw, self.settings.limits)
            except DataError as error:
                raise Refused(422 if error.field else 400, str(error), error.field) from error
            return content_of(asked, await self._judged(request, asked, ends))
        finally:
            self.metrics.inside -= 1

    async def _judged(self, request: Request, asked: Asked, ends: float) -> Judged:
        """Return what the model says, or raise what comes first instead."""
        work = asyncio.wrap_future(self.batcher.submit(asked))
        gone = asyncio.ensure_future(_disconnected(request))
        over = asyncio.ensure_future(self._over.wait())
        first: set[asyncio.Future[Any]] = {work, gone, over}
        left = ends - asyncio.get_running_loop().time()
        try:
            await asyncio.wait(first, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise Refused(_GONE, "the client has closed the connection")
            if over.done():
                raise _closing()
            raise Refused(504, f"not scored within {self.settings.seconds:g} s, and dropped")
        except DataError as error:
            if error.file is None:  # a fault of the model, not of a picture
                raise
            fault = asked.refusal(0, error)
            raise Refused(422, str(fault), fault.field) from error
        finally:
            for waiting in first:
                waiting.cancel()  # what still waits in the queue is dropped

    async def health(self) -> Response:
        """Answer ``GET /health``: whether the server takes requests, what its scores mean."""
        is_well = self.batcher.is_alive and not self.is_closing
        about = {"status": "ok" if is_well else "closing", **self.about}
        return _json(200 if is_well else 503, about)

    async def counts(self, request: Request) -> Response:
        """Answer ``GET /metrics`` in the text format of Prometheus."""
        try:
            self.check_token(request)
        except Refused as refused:
            return _refusal(refused)
        text = self.metrics.text(
            waiting=self.batcher.waiting,
            batches=self.batcher.batches,
            solutions=self.batcher.solutions,
            scoring_seconds=self.batcher.seconds,
        )
        return Response(text, media_type=CONTENT_TYPE)

    def check_token(self, request: Request) -> None:
        """Refuse a client that does not show the token.

        Raises:
            Refused: With 401.
        """
        if self.settings.token is None:
            return
        expected = f"Bearer {self.settings.token}".encode()
        shown = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(expected, shown):
            raise Refused(401, "expected Authorization: Bearer TOKEN with the server's token")


def _closing() -> Refused:
    return Refused(503, "the server is closing")


async def _body(request: Request, most: int, ends: float, *, kept: bool = True) -> bytes:
    """Return the body of a request, of which no more than ``most`` bytes are ever held."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_large(most)
    parts, size, goes_on = [], 0, True
    try:
        async with asyncio.timeout_at(ends):
            while goes_on:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Refused(_GONE, "the client has closed the connection")
                part, goes_on = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                if size > most:
                    raise _too_large(most)
                if kept:
                    parts.append(part)
    except TimeoutError as error:
        raise Refused(408, "the request did not arrive in time") from error
    return b"".join(parts)


def _too_large(most: int) -> Refused:
    return Refused(413, f"expected a request of at most {most:,} bytes, found more")


async def _disconnected(request: Request) -> None:
    """Return when the client is gone. The body has been read: nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def content_of(asked: Asked, judged: Judged) -> Mapping[str, Any]:
    """Return the answer to a request.

    Raises:
        Refused: The one solution of a request without ``solutions`` cannot be judged.
    """
    results: list[Mapping[str, Any]] = []
    for row, one in enumerate(judged):
        if isinstance(one, Judgement):
            results.append(
                {
                    "score": one.score,
                    "step_scores": list(one.step_scores),
                    "steps": one.steps,
                    "truncated": one.is_truncated,
                }
            )
            continue
        fault = asked.refusal(row, one)
        if asked.form != "solutions":
            raise Refused(422, str(fault), fault.field)
        results.append(_error(str(fault), fault.field))
    return {"results": results} if asked.form == "solutions" else results[0]


def _error(message: str, field: str | None) -> Mapping[str, Any]:
    return {"error": {"field": field, "message": message}}


def _json(status: int, content: Mapping[str, Any], **headers: str) -> Response:
    text = json.dumps(content, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def _refusal(refused: Refused) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    content = _error(refused.message, refused.field)
    return _json(refused.status, content, **headers.get(refused.status, {}))


def make_app(scorer: Judge, settings: Settings, *, at_once: int, about: Mapping[str, Any]) -> Any:
    """Return the application, a ``fastapi.FastAPI``; its ``state.service`` is the ``Service``.

    Args:
        scorer: What scores.
        settings: How clients are treated.
        at_once: The largest number of solutions that are scored together.
        about: What ``/health`` tells of the model.
    """
    service = Service(scorer, settings, at_once, about)
    # The pages of FastAPI that show the schema load scripts from elsewhere.
    app = FastAPI(title="bilevel-prm", lifespan=service.running, docs_url=None, redoc_url=None)
    app.state.service = service
    schema = {"schema": request_schema(settings.limits)}
    body = {"requestBody": {"required": True, "content": {"application/json": schema}}}
    app.add_api_route(
        "/score",
        service.answer,
        methods=["POST"],
        openapi_extra=body,
        responses=answer_schema(),
    )
    app.add_api_route("/health", service.health)
    app.add_api_route("/metrics", service.counts)
    return app
