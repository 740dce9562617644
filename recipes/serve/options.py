"""Options of ``serve`` and ``parity``. Nothing here imports torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from prm.names import TooLong
from recipes.options.base import (
    MOST_EXAMPLES,
    MOST_NUMBER,
    MOST_ROWS,
    MOST_THREADS,
    PlacementOptions,
    PrmOptions,
    group,
    option,
    tokens_per_batch,
)

TOKEN = "BILEVEL_PRM_TOKEN"
"""The environment variable of the token, which other users of the machine cannot see."""

_TOKEN_HELP = f"(default: the environment variable {TOKEN}; users of the machine see options)"
_MOST_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """The most that one request may bring (``recipes.serve.requests.Limits``)."""

    body: int = option(
        32 * 2**20,
        "most bytes of a request, pictures included",
        name="max_body",
        least=1,
        most=_MOST_BYTES,
    )
    candidates: int = option(
        64, "most solutions of a request", name="max_candidates", least=1, most=MOST_EXAMPLES
    )
    steps: int = option(
        256, "most steps of a solution", name="max_steps", least=1, most=MOST_EXAMPLES
    )
    characters: int = option(
        200_000,
        "most characters of the question and all solutions of a request",
        name="max_characters",
        least=1,
        most=_MOST_BYTES,
    )
    images: int = option(
        16, "most pictures of a request", name="max_images", least=0, most=MOST_EXAMPLES
    )
    image_bytes: int = option(
        16 * 2**20, "most bytes of a picture", name="max_image_bytes", least=1, most=_MOST_BYTES
    )
    pixels: int = option(
        20_000_000, "most pixels of a picture", name="max_pixels", least=1, most=80_000_000
    )


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Answer requests to score over HTTP (needs the extra `serve`)."""

    model: str = option(
        ..., "folder or hub name of a model that says how it is asked, as `train` writes it"
    )
    host: str = option(
        "127.0.0.1", "address to listen on; one that other machines reach needs a --token"
    )
    port: int = option(8000, "port to listen on; 0: any that is free", least=0, most=65_535)
    token: str | None = option(
        None, f"what clients must show as `Authorization: Bearer TOKEN` {_TOKEN_HELP}"
    )
    placement: PlacementOptions = group(PlacementOptions, "device and precision")
    threads: int = option(0, "CPU threads of torch (0: all cores)", least=0, most=MOST_THREADS)
    too_long: TooLong = option(
        "refuse",
        "what a solution longer than the model's context leads to: its refusal; or its first "
        "steps, as many as fit, are scored",
    )
    eval_batch_size: int = option(
        64,
        "most solutions per forward pass, of requests that wait at the same time; with 1 the bits "
        "of a score do not depend on who else asks",
        least=1,
        most=MOST_EXAMPLES,
    )
    tokens_per_batch: int = tokens_per_batch()
    max_requests: int = option(
        64,
        "most requests that are read, wait or are scored at a time; others are answered 429",
        least=1,
        most=MOST_EXAMPLES,
    )
    timeout: float = option(
        60.0,
        "seconds after which a request is dropped and answered 504",
        least=0,
        most=MOST_NUMBER,
    )
    grace: float = option(
        30.0,
        "seconds that requests have to be answered once SIGTERM or SIGINT ends the server",
        least=0,
        most=MOST_NUMBER,
    )
    limits: LimitOptions = group(LimitOptions, "limits")


@dataclass(frozen=True, kw_only=True)
class ParityOptions(PrmOptions):
    """Compare the step scores of a running server with ours, on a file of solutions."""

    HIDES_LABELS: ClassVar[bool] = True

    placement: PlacementOptions = group(PlacementOptions, "device and precision")
    server: str = option(..., "address of the server, such as http://127.0.0.1:8000")
    api: Literal["vllm", "vllm-chat", "sglang", "bilevel-prm"] = option(
        "vllm",
        "how it is asked: vllm: /generative_scoring (text); vllm-chat: prompt_logprobs of "
        "/v1/chat/completions (text and pictures); sglang: /v1/score (text); bilevel-prm: /score",
    )
    served_model: str | None = option(None, "name of the model on the server (default: --model)")
    token: str | None = option(None, f"sent as `Authorization: Bearer TOKEN` {_TOKEN_HELP}")
    file: str = option(..., "JSONL of solutions")
    limit: int = option(
        100, "how many of the file's solutions are compared", least=1, most=MOST_ROWS
    )
    tolerance: float = option(
        0.01,
        "largest difference of a step's score with which the command ends well (status 0)",
        least=0,
        most=1,
    )
    timeout: float = option(
        60.0, "seconds that the server may take for an answer", least=0, most=MOST_NUMBER
    )
    eval_batch_size: int = option(
        64, "most solutions per forward pass when scoring here", least=1, most=MOST_EXAMPLES
    )
    tokens_per_batch: int = tokens_per_batch()
