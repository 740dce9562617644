"""Chat templates of checkpoints are programs: find out in time whether they end.

A template is written in Jinja, whose sandbox limits neither time nor memory: nested loops, powers
and repeated strings can take hours or all memory, some of them inside one operation that nothing
in the same process can stop. So a template renders two conversations in a process of its own,
with limits, before this process renders it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

CPU_SECONDS = 3
"""Processor time of the trial; a template takes milliseconds."""
MEMORY_BYTES = 2**30
"""Address space of the trial, with Python itself."""
MOST_CHARACTERS = 2**20
"""Length of a template, and of what it renders from a short conversation."""
_WALL_SECONDS = 120  # only where there is no limit on processor time, or the process is stopped
_ENDED, _FAILED, _EXCEEDED = 0, 3, 4  # exit statuses; Python's own are 1 and 2


def check_terminates(template: Any, name: str) -> None:
    """Refuse a chat template that takes too long, too much memory, or renders too much.

    A template that fails is left to whoever renders it, who can say with which turns. The result
    is remembered for each text.

    Args:
        template: The text, or a dict of texts by name. Anything else is ignored.
        name: The checkpoint, for the message.

    Raises:
        ModelError: The template exceeds a limit.
    """
    from prm.models.untrusted import ModelError

    for text in template.values() if isinstance(template, dict) else [template]:
        if isinstance(text, str) and (reason := _trial(text)):
            raise ModelError(
                f"{name}: expected a chat template that renders a short conversation at once, but "
                f"it {reason}; look for loops in chat_template.jinja or tokenizer_config.json"
            )


@lru_cache(maxsize=64)
def _trial(template: str) -> str | None:
    if len(template) > MOST_CHARACTERS:
        return f"is {len(template)} characters long (limit {MOST_CHARACTERS})"
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=template.encode("utf-8", errors="surrogatepass"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {_WALL_SECONDS} seconds"
    if done.returncode in (_ENDED, _FAILED):
        return None
    if done.returncode == _EXCEEDED or done.returncode < 0:  # or killed by the limit on time
        return (
            f"took more than {CPU_SECONDS} seconds, took more than {MEMORY_BYTES >> 20} MiB, or "
            f"rendered more than {MOST_CHARACTERS} characters"
        )
    return f"could not be tried ({sys.executable} ended with status {done.returncode})"


def _limit() -> None:
    try:
        import resource
    except ImportError:  # no such limits on Windows, where the time alone is limited
        return
    for limit, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(limit, (most, hard))


def _conversations() -> list[list[dict[str, Any]]]:
    """Return a short and a longer conversation, with turns as text and as lists of parts."""
    long = [{"role": "system", "content": "Judge every step."}]
    for number in range(20):
        long.append(
            {"role": "user", "content": f"Step {number}: so x + {number} = {2 * number}. " * 9}
        )
        long.append({"role": "assistant", "content": "+"})
    short = long[:3]
    typed = [
        {**turn, "content": [{"type": "image"}, {"type": "text", "text": turn["content"]}]}
        for turn in long
    ]
    return [short, typed, long]


def _main() -> int:
    """Render the template on standard input as transformers would; return an exit status."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (of a class of Jinja)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    template = sys.stdin.buffer.read().decode("utf-8", errors="surrogatepass")
    _limit()
    failed = False
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, default=str)
    try:
        compiled = environment.from_string(template)
    except MemoryError:
        return _EXCEEDED
    except Exception:
        return _FAILED
    for messages in _conversations():
        for generate in (False, True):
            try:
                length = 0
                for piece in compiled.generate(messages=messages, add_generation_prompt=generate):
                    length += len(piece)
                    if length > MOST_CHARACTERS:
                        return _EXCEEDED
            except MemoryError:
                return _EXCEEDED
            except Exception:
                failed = True
    return _FAILED if failed else _ENDED


if __name__ == "__main__":
    sys.exit(_main())
