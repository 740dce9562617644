"""``bilevel-prm serve``: the application behind uvicorn, until a signal ends it."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from prm.rewards.scorer import Scorer
from recipes.models.loading import placement_of
from recipes.options.values import OptionError
from recipes.run.errors import Stopped
from recipes.serve.options import TOKEN, ServeOptions
from recipes.serve.requests import Limits
from recipes.stopping import Interrupted
from recipes.terminal import say

_TOKEN = re.compile(r"[!-~]+")
_BACKSTOP = 10
"""Seconds behind ``--grace`` after which uvicorn cuts off connections that are still open."""


def run_serve(options: ServeOptions) -> None:
    """Serve until SIGTERM or SIGINT; requests that are inside are answered within ``--grace``.

    Raises:
        ModuleNotFoundError: The extra ``serve`` is not installed.
        OptionError: The model cannot be used, the address cannot be listened on, or it is one that
            other machines reach and there is no token.
        Stopped: A signal ended the server.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'bilevel-prm[serve]'"
        ) from error
    from recipes.serve.app import Settings, make_app

    settings = Settings(
        limits=Limits(**vars(options.limits)),
        most_requests=options.max_requests,
        seconds=options.timeout,
        grace=options.grace,
        token=token_of(options.token),
    )
    with bound(options.host, options.port, has_token=settings.token is not None) as listener:
        scorer = _scorer(options)
        about = {
            "model": Path(options.model).name,
            "aggregation": scorer.conventions.aggregation,
            "threshold": scorer.conventions.threshold,
        }
        app = make_app(scorer, settings, at_once=options.eval_batch_size, about=about)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(options.grace) + _BACKSTOP,
        )
        server = _server(config, app.state.service, _url(options.host, listener), options.model)
        stopped = signal.SIGINT
        try:
            server.run(sockets=[listener])
        except Interrupted as interrupted:  # raised again by uvicorn when all is answered
            stopped = signal.Signals(interrupted.number)
    answers = app.state.service.metrics.answers
    told = ", ".join(f"{count} x {status}" for status, count in sorted(answers.items()))
    message = f"ended by {stopped.name}; requests answered: {told or 'none'}"
    if app.state.service.batcher.is_alive:
        # The pass that still runs cannot be interrupted, and torch aborts in a thread whose
        # interpreter ends.
        say(f"bilevel-prm serve: {message}; a batch was left unfinished", error=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + stopped)
    raise Stopped(message, 128 + stopped)


def token_of(option: str | None) -> str | None:
    """Return the token of the option or of the environment, None if there is none.

    Raises:
        OptionError: It is blank, or cannot stand in a header.
    """
    source, token = ("--token", option) if option is not None else (TOKEN, os.environ.get(TOKEN))
    if token is not None and not _TOKEN.fullmatch(token):
        raise OptionError(
            f"{source}: expected a token of printable ASCII characters without spaces (its value "
            "is not shown here)"
        )
    return token


def bound(host: str, port: int, *, has_token: bool) -> socket.socket:
    """Return a socket that has the address but does not listen yet.

    Raises:
        OptionError: The address is none of this machine or taken, or other machines reach it and
            there is no token.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise OptionError(f"--host {host}: {error}; give an address of this machine") from error
    if not has_token and not ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback:
        raise OptionError(
            f"--host {host}: other machines reach it, and there is no token: anyone could have "
            f"this machine compute. Set {TOKEN} or --token, or keep to 127.0.0.1"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OptionError(
            f"--host {host} --port {port}: {error.strerror}; choose another port, or end what "
            "listens there"
        ) from error
    return listener


def _url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def _scorer(options: ServeOptions) -> Scorer:
    if options.threads:
        torch.set_num_threads(options.threads)
    placement = placement_of(options.placement)
    try:
        return Scorer(
            placement.load(options.model),
            batch_size=options.eval_batch_size,
            tokens_per_batch=options.tokens_per_batch,
            too_long=options.too_long,
        )
    except (OSError, ValueError) as error:
        raise OptionError(f"--model {options.model}: {' '.join(str(error).split())}") from error


def _server(config: Any, service: Any, url: str, model: str) -> Any:
    """Return a server of uvicorn that says when it is ready and tells the service of its end."""
    import uvicorn

    class Server(uvicorn.Server):  # type: ignore[misc]  # uvicorn is an extra
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(f"{url}: serving {model}; POST /score, GET /health, GET /metrics; Ctrl-C ends it")
            sys.stdout.flush()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.close()
            super().handle_exit(sig, frame)

    return Server(config)
