"""The subset of LaTeX that final answers use."""

from __future__ import annotations

import re

_UPRIGHT = "text|textbf|mathrm|mathbf|mbox|operatorname"


def boxed(text: str) -> str:
    r"""Return the content of the last ``\boxed{...}`` with matching braces, or else the text."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return text
    start = text.index("{", start) + 1
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[start:index].strip()
    return text


def plain_text(text: str) -> str:
    r"""Convert the LaTeX of an answer to plain text.

    ``\frac{a}{b}`` becomes a/b, ``\sqrt{a}`` sqrt(a), ``^\circ`` ° and ``\%`` %. Commands for fonts
    and spacing are removed; of any other command the name remains, without backslash.
    """
    text = re.sub(r"(?<=\d)(?:\\,|\{,\})(?=\d{3})", "", text)  # A separator of thousands.
    text = re.sub(r"\\(?:(?:left|right|displaystyle)(?![A-Za-z])|[,;:! ])|~", " ", text)
    text = text.replace(r"\%", "%").replace(r"\$", "$").replace(r"\{", "{").replace(r"\}", "}")
    degree = r"\\(?:circ|degree)(?![A-Za-z])"
    text = re.sub(rf"\^\s*\{{\s*{degree}\s*\}}|\^?\s*{degree}", "°", text)
    text = re.sub(r"\\(?:times|cdot)", "*", text)
    group = r"\{([^{}]*)\}"
    before = None
    while text != before:  # Innermost first.
        before = text
        text = re.sub(rf"\\(?:{_UPRIGHT})\s*{group}", r" \1 ", text)
        text = re.sub(rf"\\sqrt\s*(?:{group}|(\w))", lambda m: f"sqrt({m[1] or m[2]})", text)
        text = re.sub(rf"\^{group}", lambda m: f"^{_grouped(m[1])}", text)
        text = re.sub(rf"_{group}", r"_\1", text)
        text = re.sub(
            rf"(\d)?\s*\\[dtc]?frac\s*(?:{group}|(\w))\s*(?:{group}|(\w))",
            lambda m: (
                (f"{m[1]} " if m[1] else "")
                + f"{_grouped(m[2] or m[3] or '')}/{_grouped(m[4] or m[5] or '')}"
            ),
            text,
        )
    return re.sub(r"\\([A-Za-z]+)", r"\1", text).strip()


def _grouped(text: str) -> str:
    """Put ``text`` into round brackets unless it is one number, one word or one function."""
    text = text.strip()
    return text if re.fullmatch(r"[-+]?[\w.]*(?:\([^()]*\))?", text) else f"({text})"
