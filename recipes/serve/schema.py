"""The JSON schema of requests and answers, which ``/openapi.json`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.serve.requests import Limits

Schema = Mapping[str, Any]

_SOLUTION: Schema = {
    "type": "object",
    "required": ["score", "step_scores", "steps", "truncated"],
    "properties": {
        "score": {"type": "number", "description": "by the model's aggregation"},
        "step_scores": {"type": "array", "items": {"type": "number"}},
        "steps": {"type": "integer", "description": "more than step scores if truncated"},
        "truncated": {"type": "boolean", "description": "the first steps alone were judged"},
    },
}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["field", "message"],
            "properties": {"field": {"type": ["string", "null"]}, "message": {"type": "string"}},
        }
    },
}
_STATUSES = {
    400: "no JSON object",
    401: "no token, or another",
    408: "the request did not arrive in time",
    413: "too many bytes",
    415: "no application/json",
    422: "a field is wrong, or the solution cannot be judged",
    429: "too many requests are waiting",
    503: "the server is closing",
    504: "not scored in time",
}


def request_schema(limits: Limits) -> Schema:
    """Return the schema of a request; the sums over its fields are limited, too."""
    text = {"type": "string", "maxLength": limits.characters}
    steps = {"type": "array", "items": text, "maxItems": limits.steps}
    image = {"type": "string", "description": 'base64, or a "data:" URL; nothing is fetched'}
    return {
        "type": "object",
        "required": ["question"],
        "additionalProperties": False,
        "oneOf": [{"required": [name]} for name in ("solution", "steps", "solutions")],
        "properties": {
            "question": text,
            "images": {"type": "array", "items": image, "maxItems": limits.images},
            "solution": text,
            "steps": steps,
            "solutions": {
                "type": "array",
                "items": {"anyOf": [text, steps]},
                "minItems": 1,
                "maxItems": limits.candidates,
            },
        },
    }


def answer_schema() -> dict[int | str, dict[str, Any]]:
    """Return the schemas of the answers by status."""
    result = {"anyOf": [_SOLUTION, _ERROR]}
    results = {
        "type": "object",
        "required": ["results"],
        "properties": {"results": {"type": "array", "items": result}},
    }
    scores = {"anyOf": [_SOLUTION, results]}
    return {
        200: {"description": "scores", "content": {"application/json": {"schema": scores}}},
        **{
            status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
            for status, text in _STATUSES.items()
        },
    }
