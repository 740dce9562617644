r"""The subset of LaTeX that final answers use, as plain text.

Notation only is unified, no algebra is done: what is joined are two spellings of one formula.
"""

from __future__ import annotations

import re
from fractions import Fraction

from prm.evaluation.brackets import spans, split_outside

_TEXTS = "text|textbf|textit|textrm|textsf|texttt|textnormal|textup|mbox|hbox|emph"
_FONTS = f"{_TEXTS}|mathrm|mathbf|mathit|mathsf|mathbb|mathcal|operatorname|boldsymbol|bm|underline"
_SIZES = "left|right|middle|displaystyle|textstyle|limits|rm|bf|[bB]igg?[lrm]?|nobreak|strut|hline"
_SPACES = "quad|qquad|enspace|thinspace|medspace|thickspace|negthinspace"
_SYMBOLS = {
    **{"cdot": "*", "ast": "*", "times": "×", "div": "/"},
    **dict.fromkeys(("le", "leq", "leqslant"), "≤"),
    **dict.fromkeys(("ge", "geq", "geqslant"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **{"lt": "<", "gt": ">", "in": "∈", "cup": "∪", "cap": "∩", "pm": "±", "mp": "∓"},
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    **dict.fromkeys(("to", "rightarrow", "longrightarrow"), "→"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(("ldots", "dots", "cdots"), "..."),
    **{"infty": "∞", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]"},
    **{"langle": "⟨", "rangle": "⟩"},
    **{"prime": "'", "colon": ":", "angle": "∠", "approx": "≈", "setminus": "∖"},
    **{"triangle": "△", "perp": "⊥", "parallel": "∥", "sim": "∼", "cong": "≅", "equiv": "≡"},
    **{"lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "partial": "∂", "nabla": "∇"},
    **{"notin": "∉", "subset": "⊂", "subseteq": "⊆", "supset": "⊃", "supseteq": "⊇"},
    **{"forall": "∀", "exists": "∃", "neg": "¬", "lnot": "¬"},
    **dict.fromkeys(("land", "wedge"), "∧"),
    **dict.fromkeys(("lor", "vee"), "∨"),
    **dict(
        zip(
            (
                *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"),
                *("kappa", "lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon"),
                *("phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi"),
                *("Sigma", "Phi", "Psi", "Omega", "varepsilon", "vartheta", "varphi"),
            ),
            "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩεθφ",
            strict=True,
        )
    ),
}
_TYPED = {
    **{"<=": "≤", ">=": "≥", "!=": "≠", "+/-": "±", "+-": "±", "⩽": "≤", "⩾": "≥"},
    **{"·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "∣": "|", "∛": r"\sqrt[3]"},
}
"""Symbols as they are typed without LaTeX."""
DOUBLE_STRUCK = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "𝔸𝔹ℂ𝔻𝔼𝔽𝔾ℍ𝕀𝕁𝕂𝕃𝕄ℕ𝕆ℙℚℝ𝕊𝕋𝕌𝕍𝕎𝕏𝕐ℤ", strict=True))
r"""The letters of ``\mathbb``, which name sets and are not those of the plain alphabet."""
_DOUBLE_STRUCK = re.compile(r"\\mathbb(?![A-Za-z])\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))")
FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh"),
        *("tanh", "log", "ln", "lg", "exp", "sqrt", "root", "det", "max", "min", "gcd", "lcm"),
    )
)
"""Names that are functions and no words."""
_FUNCTION = "|".join(sorted(FUNCTIONS - {"sqrt", "root"}, key=len, reverse=True))
_GROUP = r"\{([^{}]*)\}"
_ADJOINING = re.compile(r"(?<=\\text\{)([^{}]*)\}\\text\{(?=[^{}]*\})")
_LETTERS_APART = re.compile(r"(?<![^\W\d_])([^\W\d_]) (?=[^\W\d_](?![^\W\d_]))")
_LOG = re.compile(r"(\\log_)(\d)(\d+)(?=[^\w\s({\\^.°]|\s*$)")
"""A logarithm with no argument behind its index, of which TeX takes one digit: log_2 3."""
_SWITCH = r"\\(?:rm|bf|it|sf|tt|displaystyle|textstyle)"
_NO_ARGUMENT = r"(?<![\\\w}\]^_])"
"""No command, exponent or index stands in front, of which a group would be an argument."""
_BOX = re.compile(r"\\(?:boxed|f(?:rame)?box)(?![A-Za-z])\s*+(?:\{|([^\s$\\{]+))")
_SIGN_OF_BOX = re.compile(
    r"(?:(?P<formula>[=({\[≈≤≥≠<>&]|\\(?:approx|leq?|geq?|neq?|[(\[])(?![A-Za-z]))\s*"
    r"|(?P<dollars>(?<!\$)\${1,2})\s*|(?:^|\n|[,:;]|(?<![A-Za-z\\])[A-Za-z]{2,}\s)\s*)"
    r"(?P<sign>[-\u2010-\u2015\u2212±]|\\pm(?![A-Za-z]))(?P<gap>\s*)\$?\Z"
)
"""A sign in front of a box, and in front of that nothing to add to or to subtract from."""
_LONGEST_SIGN = 24
_LETTER = re.compile(r"\(?(?:\\text\w*\{)?\s*\(?[A-J]\)?\s*\}?\)?")
_MATRIX = re.compile(
    r"(?P<open>(?:\\left\s*)?[(\[]\s*)?"
    r"\\begin\{(?P<kind>[pbBvV]?matrix|smallmatrix|array)\}\s*(?:\{[^{}]*\})?"
    r"(?P<body>(?:(?!\\begin\{).)*?)\\end\{(?P=kind)\}"
    r"(?P<close>\s*(?:\\right\s*)?[)\]])?",
    re.DOTALL,
)
_MATRIX_KINDS = {"vmatrix": "determinant", "Vmatrix": "norm"}
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")


def last_box(text: str) -> tuple[int, int, str] | None:
    r"""Return start, end and content of the last closed ``\boxed{...}`` or ``\fbox{...}``.

    Braces are matched, escaped ones (``\{``) not counted; ``\boxed 7`` boxes one word. An empty box
    and one that is never closed, as of a text that was cut off, do not count. A sign in front of
    the box belongs to its content: ``x = -\boxed{5}`` is -5, but ``7 - \boxed{5}`` holds 5.
    """
    boxes = list(_BOX.finditer(text))
    closing = _closing(text) if boxes else {}
    for box in reversed(boxes):
        start = box.end()
        end = start if box[1] else closing.get(start - 1, start)
        content = (box[1].rstrip(".,;") if box[1] else text[start:end]).strip()
        if content:
            return box.start(), end, _signed(text, box.start(), content)
    return None


def _signed(text: str, start: int, content: str) -> str:
    """Return the content of a box with the sign that stands in front of it."""
    begin = max(0, start - _LONGEST_SIGN)
    found = _SIGN_OF_BOX.search(text[begin:start])
    if found is None or (begin and not found.start()) or _LETTER.fullmatch(content):
        return content
    dollars = found["dollars"]
    if dollars and text.count(dollars, 0, begin + found.start()) % 2:
        return content  # They close a formula, from which the box is subtracted.
    if found["gap"] and not (dollars or found["formula"]):
        return content  # A dash of the sentence, or the mark of an item.
    if re.search("[-+±=<>,]", content):
        content = f"({content})"
    return found["sign"] + content


def _closing(text: str) -> dict[int, int]:
    """Return the index of the brace that closes each one that is closed, in one pass."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


_OPTION = re.compile(r"\s*\(?[A-J]\)\s+")
"""The letter of an option in front of its text: no factor of the fraction behind."""


def plain_text(text: str) -> str:
    r"""Convert the LaTeX of an answer to plain text.

    ``\frac{a}{b}`` becomes a/b, ``\sqrt{a}`` sqrt(a), ``\pi`` π, ``\le`` ≤, ``^\circ`` ° and ``\%``
    %, a matrix ``matrix(a,b;c,d)``. Brackets are set where a formula would change without:
    ``\frac{1}{2x}`` is 1/(2x), ``x^{2y}`` is x^(2y). Commands for fonts, sizes and spacing are
    removed; of any other command the name remains, without backslash.
    """
    text = re.sub(r"(?<=[\^_]\d)(?:\\[!,]\s*)+", " ", text)  # TeX takes one digit: x^2\,345.
    text = re.sub(r"\\!\s*", "", text)  # A negative space: what stands around it belongs together.
    text = re.sub(
        r"(?<=\d)(?:\\,|\s*\{,\s*\}\s*)(?=\d{3}(?!\d))", "", text
    )  # A separator of thousands.
    for typed, symbol in _TYPED.items():
        text = text.replace(typed, symbol)
    text = _DOUBLE_STRUCK.sub(lambda m: DOUBLE_STRUCK[m[1] or m[2]], text)
    text = _LOG.sub(r"\1\2 \3", text)
    text = _ADJOINING.sub(r"\1", text)  # \text{a}\text{b c} is ab c.
    text = _MATRIX.sub(_matrix, text)
    text = re.sub(r"\\(?:left|right)\s*\.", " ", text)
    text = _ungrouped(text)
    text = re.sub(rf"\\(?:(?:{_SIZES}|{_SPACES})(?![A-Za-z])|[,;: ])|~", " ", text)
    text = re.sub(r"\\([%$#&_{}])", r"\1", text)
    degree = r"\\(?:circ|degree)(?![A-Za-z])"
    text = re.sub(rf"\^\s*\{{\s*{degree}\s*\}}|\^?\s*{degree}", "°", text)
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _SYMBOLS.get(m[1], m[0]), text)
    text = re.sub(r"\^\s*(?:'|\{\s*'\s*\})", "'", text)
    text = re.sub(r"(?<![A-Za-z\\])[Pp]i(?![A-Za-z])", "π", text)
    text = re.sub(r"(?<![A-Za-z\\])inf(?:inity)?(?![A-Za-z])", "∞", text, flags=re.IGNORECASE)
    text = re.sub(r"(?:√\s*|(?<![A-Za-z\\])sqrt\s*)(\d+|[^\W\d_](?![^\W\d_]))", r"sqrt(\1)", text)
    text = re.sub(r"√\s*(?=\()", "sqrt", text)
    text = re.sub(r"(?<![\w∞)\]])\+\s*∞", "∞", text)
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", "∪", text)
    if repeating := _REPEATING.fullmatch(text.strip()):
        return _repeating(repeating)
    before = None
    while text != before:  # Innermost first.
        before = text
        text = re.sub(rf"\\(?:{_TEXTS})\s*{_GROUP}", _as_text, text)
        text = re.sub(rf"\\(?:{_FONTS})\s*{_GROUP}", r" \1 ", text)
        text = re.sub(
            rf"\\sqrt\s*\[([^\[\]{{}}]*)\]\s*(?:{_GROUP}|(\w))",
            lambda m: f"root({m[1].strip()},{(m[2] or m[3] or '').strip()})",
            text,
        )
        text = re.sub(
            rf"\\sqrt\s*(?:{_GROUP}|(\w))", lambda m: f"sqrt({(m[1] or m[2] or '').strip()})", text
        )
        text = re.sub(
            rf"([\^_])\s*{_GROUP}(?=(\d?))",
            lambda m: f"{m[1]}{_factor(m[2])}{m[3] and ' '}",  # 2^{3}4 is not 2^34.
            text,
        )
        text = re.sub(
            rf"\\[dt]?binom\s*(?:{_GROUP}|(\w))\s*(?:{_GROUP}|(\w))",
            lambda m: f" binom({m[1] or m[2] or ''},{m[3] or m[4] or ''})",
            text,
        )
        text = re.sub(
            rf"(\^\s*|\d\s*|[^\W\d]\s*|\)\s*)?\\[dtc]?frac\s*(?:{_GROUP}|(\w))\s*(?:{_GROUP}|(\w))"
            r"(?=(\d?))",
            _fraction,
            text,
        )
        text = re.sub(
            rf"\\(?!(?:{_FONTS}|[dtc]?frac|[dt]?binom|sqrt)(?![A-Za-z]))([A-Za-z]+)((?:_\w|_\([^()]*\))?)\s*"
            rf"((?:{_GROUP}\s*)+)",
            lambda m: f" {m[1]}{m[2]}{_bracketed(','.join(re.findall(_GROUP, m[3])))}",
            text,
        )
    text = re.sub(r"\\([A-Za-z]+)", r" \1 ", text)
    return _functions(text).strip()


def _ungrouped(text: str) -> str:
    r"""Remove braces of a font, a colon, or the whole: ``{\rm cm}``, ``\bf{5}``, ``2{:}30``."""
    text = re.sub(rf"{_NO_ARGUMENT}\{{\s*{_SWITCH}(?![A-Za-z])([^{{}}]*)\}}", r" \1 ", text)
    text = re.sub(rf"{_SWITCH}\s*{_GROUP}", r" \1 ", text)
    text = re.sub(r"(?<=\d)\{:\}(?=\d)", ":", text).strip()
    while text.startswith("{") and "\\" in text and _closing(text).get(0) == len(text) - 1:
        if len(split_outside(text[1:-1], ",")) > 1:
            break  # A set whose braces were not escaped.
        text = text[1:-1].strip()
    return text


def _as_text(match: re.Match[str]) -> str:
    """Return text with spaces around, and with ␣ between two letters, which are no product."""
    return " " + _LETTERS_APART.sub(r"\1␣", match[1]) + " "


def _bracketed(text: str) -> str:
    """Put ``text`` into round brackets unless it is."""
    return text if text[:1] == "(" and spans(text) else f"({text})"


def _matrix(match: re.Match[str]) -> str:
    r"""Write a matrix as ``matrix(a,b;c,d)``: round and square brackets are one matrix."""
    kind = match["kind"]
    name = _MATRIX_KINDS.get(kind, "matrix")
    before, after = match["open"] or "", match["close"] or ""
    bare = kind in ("array", "matrix", "smallmatrix")
    if bare and before and after:
        before = after = ""
    elif bare:
        name = "array"
    rows = [
        ",".join(cell.strip() for cell in row.split("&"))
        for row in re.split(r"\\\\(?:\[[^\]]*\])?", match["body"].replace(r"\hline", ""))
        if row.strip()
    ]
    return f"{before}{name}({';'.join(rows)}){after}"


def _repeating(match: re.Match[str]) -> str:
    r"""Return the exact fraction of a repeating decimal: ``0.\overline{3}`` is 1/3."""
    sign, whole, fixed, period = match.groups()
    scale = 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed), scale)
    value += Fraction(int(period), scale * (10 ** len(period) - 1))
    return f"{sign}{value}"


def _fraction(match: re.Match[str]) -> str:
    option = match[1] if _OPTION.fullmatch(match.string, 0, match.end(1)) else ""
    before = "" if option else (match[1] or "").rstrip()
    above = (match[2] if match[2] is not None else match[3] or "").strip()
    below = _factor(match[4] if match[4] is not None else match[5] or "")
    if re.search(r"(?<=.)[-+±]|[=<>≤≥≠,]", above):
        above = f"({above})"
    if not before and re.fullmatch(r"-[\d.]+|\(-[^()+-]*\)", below) and above[:1] != "(":
        above = above[1:] if above[:1] == "-" else f"-{above}"
        below = _factor(below.strip("()")[1:])
    quotient = f"{above}/{below}{match[6] and '*'}"  # What follows 1/2 is not of its divisor.
    if before == "^":
        return f"^({quotient})"
    if before.isdigit() and above.isdigit() and below.isdigit():
        return f"{before} {quotient}"  # A mixed number.
    return f"{before}*{quotient}" if before else option + quotient


def _factor(text: str) -> str:
    """Put ``text`` into round brackets unless it is one number, one letter or one function."""
    text = text.strip()
    alone = rf"[-+]?(?:\d+(?:\.\d*)?|\.\d+)|[^\W\d_]|∞|(?:{'|'.join(FUNCTIONS)})\([^()]*\)|\(\w\)"
    return text if not text or re.fullmatch(alone, text) else f"({text})"


def _functions(text: str) -> str:
    """Set the brackets of a function of one number or letter: "sin x" is sin(x)."""
    base = r"(?:_\d+|_[^\W\d_]|_\([^()]*\))?"
    text = re.sub(
        rf"(?<![A-Za-z])({_FUNCTION})\s*({base})\s*\{{([^{{}}]*)\}}",
        lambda m: f"{m[1]}{m[2]}{_bracketed(m[3])}",
        text,
    )
    return re.sub(
        rf"(?<![A-Za-z])({_FUNCTION})\s*({base})(?:\s+|(?<=\d)(?=[^\W\d_]))(\d+°?|[^\W\d_])(?![\w(^.*×/°])",
        r"\1\2(\3)",
        text,
    )
