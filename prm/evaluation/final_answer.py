r"""Find the final answer in the text of a solution.

Five kinds of statement are known; the last one in the text counts:

1. ``\boxed{...}`` and ``\fbox{...}``;
2. "Answer: ...", "The answer is ...", "The correct option is ...", also with emphasis, with
   "Ans:", and as a heading over the answer;
3. ``#### ...`` as in GSM8K, unless it is a heading of Markdown;
4. "A: ..." as the last line;
5. "Option B is correct.", "B is the correct answer." and, at the end, "Therefore, (B).", "Hence,
   options B and D." or "We choose B." as a sentence.

What stands in ``<answer>...</answer>`` or another tag of ``TAGS`` is all that counts.

The layout around an answer is none of it: "the following:" and "as follows:", a rule, a fence of
code, a quote, an environment of LaTeX, the mark of an item of a list below the statement ("- 5" is
5 there, and "-5" is not). All items of a list are the answer, with their numbers or letters if they
have any. What is said of an answer ("The answer is in meters.", "The answer is rounded.") does not
take the place of one that is stated.
"""

from __future__ import annotations

import re

from prm.evaluation.latex import last_box

TAGS = (
    *(("<answer>", "</answer>"), ("<final_answer>", "</final_answer>")),
    *(("[ANSWER]", "[/ANSWER]"), ("<|begin_of_box|>", "<|end_of_box|>")),
)
"""What models are told, or trained, to put around an answer."""
# The quantifiers are possessive, so that a long run of white space is matched in linear time.
_GAP = r"[ \t]*+(?:\*{1,2}+[ \t]*+)?"
_VALUE = r"(?=[ \t]*+(?:(?:option|choice)[ \t]+)?[-+$\\(\[*]*+(?:\.?\d|(?-i:[A-Jb-h])\b|[a-z]+\{))"
"""A number, a letter of a choice or a command of LaTeX is next."""
_STATED = re.compile(
    rf"(?:\b(?:answers?|ans|antwort|réponse|respuesta|risposta|resposta)|ответ|答案|答え|정답){_GAP}[:：=]"
    rf"|\banswers?{_GAP}(?:->|=>|[→⇒⟹])"
    rf"|\b(?:antwort|réponse|respuesta|risposta|resposta)[ \t]+(?:ist|est|es|è|é)\b{_VALUE}"
    rf"|^[ \t]*+\*\*(?:the[ \t]+)?final[ \t]+answer\*\*[ \t]++{_VALUE}"
    r"|\bans\.(?=[ \t])"
    rf"|\banswers?{_GAP}(?:to[ \t](?:the|this)[ \t]\w{{1,20}}{_GAP})?(?:is|are)\b{_GAP}[:：]?"
    rf"|\b(?:answers?{_GAP}(?:would|should|must|will)[ \t]be|final[ \t]answer[ \t]of)\b{_VALUE}"
    r"|答案[是为][:：]?"
    rf"|\b(?:correct|right|best)[ \t](?:answer[ \t])?(?:option|choice)s?{_GAP}"
    rf"(?:(?:is|are)\b{_GAP}[:：]?|[:：=])|\bfinal[ \t](?:option|choice)s?{_GAP}[:：=]"
    r"|(?:(?:故|因此|所以|应|应该|本题|此题)[ \t]*+选(?:择|项)?|正确选项[是为]?|^[ \t]*+选)"
    r"[ \t]*+[:：]?"
    r"(?=[ \t]*+[(（\[]?[A-J](?![A-Za-z]))"
    r"|^[ \t]*+(?:#{1,6}+[ \t]*+)?\*{0,2}+(?:final[ \t]+)?answer\*{0,2}+[ \t]*+$",
    re.IGNORECASE | re.MULTILINE,
)
_NO_ANSWER = re.compile(
    r"(?:not (?:known|clear|given|stated|correct|right|[(\[]?[A-J]|[-$\\(]*+\d+)"
    r"|(?:also |indeed )?(?:correct|right|wrong|"
    r"incorrect|verified|confirmed|reasonable|valid|consistent|unknown|unclear|obtained|as follows|"
    r"given (?:by|in|as)|found (?:by|in)))\b",
    re.IGNORECASE,
)
"""What "the answer is" may go on with without stating one."""
_REMARKED = re.compile(
    r"(?:(?:also|now|then|already)[ \t])?(?:in|to|for|exact|approximate|final|unique|complete|"
    r"precise|accurate|based|clear|close|very|given|shown|written|[a-z]{4,}(?:ed|ly))\b(?!\s*[-$\\(\d])"
)
"""What is said of an answer, unless it is the only one: "in meters", "rounded", "exact"."""
_ELSEWHERE = re.compile(
    r"(?:see|shown|given|stated)[ \t]+(?:above|below|the\b|in\b)", re.IGNORECASE
)
_INTRODUCTION = re.compile(
    r"(?:(?:(?:given|shown|stated|listed|written)[ \t]+)?(?:as[ \t]+follows|as[ \t]+below|below|"
    r"(?:in[ \t]+)?the[ \t]+following(?:[ \t]+\w{1,12})?)[ \t]*+(?:[:：]|\.?[ \t]*+(?=\n))"
    r"|given[ \t]+by[ \t]*+(?:[:：]|(?=[$\\])))\s*+",
    re.IGNORECASE,
)
_FILLER = re.compile(r"^(?:therefore|thus|hence|then|so|simply|just)\b[,:]?\s*", re.IGNORECASE)
_HASHES = re.compile(r"(?:^|(?<=\s))####[ \t]*+(?!#)([^\n#]*+)$", re.MULTILINE)
_HEADING = re.compile(r"\**(?:step|answer|final|solution|conclusion|explanation|part)\b", re.I)
_LETTER_A = re.compile(r"^[ \t]*\**A\**[ \t]*:\**[ \t]*(\S[^\n]*)\s*\Z", re.MULTILINE)
_OTHER_OPTION = re.compile(r"^[ \t]*[(\[]?B[)\].:]", re.MULTILINE)
_CALLED_CORRECT = re.compile(
    r"(?:^|[.!?。]\s|\n)[ \t]*+(?:(?:so|thus|hence|therefore),?[ \t]+)?(?:"
    r"(?:option|choice|answer)[ \t]+[(\[]?([A-J])[)\]]?[ \t]+is[ \t]+"
    r"(?:the[ \t]+)?(?:correct|right|best)(?:[ \t]+(?:answer|option|choice))?"
    r"|[(\[]?([A-J])[)\]]?[ \t]+is[ \t]+the[ \t]+(?:correct|right|best)[ \t]+"
    r"(?:answer|option|choice))[ \t]*+(?=[.!\n]|\Z)",
    re.IGNORECASE,
)
_SO = r"(?:so|thus|hence|therefore)\b,?[ \t]+"
_WE_CHOOSE = r"(?:we|I)[ \t]+(?:choose|select|pick)[ \t]+"
_OPTIONS = r"(?:the[ \t]+)?(?:option|choice|answer)s?[ \t]+"
_LETTERS = r"[(\[]?(?-i:[A-J])[)\]]?(?:(?:,|,?[ \t]+and)[ \t]+[(\[]?(?-i:[A-J])[)\]]?)*"
_CONCLUDED = re.compile(
    r"(?:^|[.!?。]\s|\n)[ \t]*+"
    rf"(?:(?:{_SO})?{_WE_CHOOSE}(?:{_OPTIONS})?|{_SO}(?:{_OPTIONS}|(?=\**[(\[])))"
    rf"\**({_LETTERS})\**[.!]?\s*\Z",
    re.IGNORECASE,
)
_ITEM = re.compile(r"[-•*]\s+(?=[(\[]?[A-J][)\]]?[.:]?(?:\s|$))")
_RULE = re.compile(r"(?:[-*_=]{3,}+|\\hrule)[ \t]*+\n\s*+")
_FENCE = re.compile(r"(`{3,}|~{3,})(?:[\w+-]*[ \t]*\n(.*?)|([^`\n]+))\1", re.DOTALL)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$[ \t]*\n([^$]+)\n[ \t]*\$", re.DOTALL)
_ENVIRONMENT = re.compile(
    r"\\begin\{((?:equation|align|aligned|gather|gathered|multline|eqnarray|displaymath|math|flalign|"
    r"split|center|quote|itemize|enumerate)\*?)\}(.*?)\\end\{\1\}",
    re.DOTALL,
)
_OBJECT = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
"""A matrix and the like, which is an answer itself."""
_ROW = re.compile(r"\\\\(?:\[[^\]]*\])?|\\item\b")
_UNPRINTED = re.compile(r"&|\\(?:nonumber|notag)\b|\\(?:tag|label)\*?\{[^{}]*\}")
_BULLET = re.compile(r"([-•*+–])[ \t]+(?=\S)")
_LABEL = re.compile(r"(?:\d{1,2}([.)])|([(\[]?)([A-Za-z])([)\].:]))[ \t]+(?=\S)")
_SENTENCE = re.compile(
    r"\W*(?:because|since|the|this|that|these|we|it|is|are|was|so|thus|hence|therefore|note|if|for|in|"
    r"let|here|explanation|reason\w*|check|verif\w+)\b",
    re.IGNORECASE,
)
_LONGEST_ITEM = 60
_OPTION = r"[A-J](?:[.):,;&]|\s*$|\s+(?:and\b|or\b|&))"
"""A letter that is set off as the one of an option is, and no article or subject of a sentence."""
_REMARK = re.compile(
    r"[.;!?](?:\*{1,2}|\$)?\s+(?=(?:I hope|Note|This|That is|These|Therefore|So|Thus|Hence|Because|"
    r"Since|The|We|It|However|In|For|If|Let|Here|Please|Also|Explanation|Reason)\b)"
    rf"|(?:(?<=[\d$}})%°\]*])[.;!]|(?<=^[A-Z])[.!])\s+(?!{_OPTION})(?=[A-Z][a-z]*\b(?!\.))"
    r"|(?<=[^\s,]),?\s++(?:because|since)\b"
)


_END_MARK = re.compile(
    r"(?:\s*(?:<[|｜](?!end_of_box)[\w▁.-]{1,40}[|｜]>|</?s>|<(?:eos|pad|end_of_turn)>"
    r"|\[/?(?:INST|EOS|PAD|SEP)\]))+\s*\Z"
)
"""The tokens that a model ends its reply with, where they were not removed."""
_IN_WORDS = re.compile(r"\\text(?:bf|it|rm|normal)?\{([^{}]*)\}")


def final_answer(text: str) -> str | None:
    r"""Return the final answer of a solution, or else a reply of a single word; None without one.

    Emphasis, a full stop, and sentences behind the answer ("I hope it is correct.") are removed;
    otherwise it is not normalised.
    """
    if tagged := _tagged(text):
        return final_answer(tagged) or _bare(without_remarks(tagged)) or None
    text = _END_MARK.sub("", text)
    for left, right in TAGS:
        if left not in text:  # The prompt opened it.
            text = text.rstrip().removesuffix(right)
    text = _IN_WORDS.sub(lambda m: m[1] if _STATED.search(m[1]) else m[0], text)
    is_word = len(text.split()) == 1 and "boxed" not in text and not text.rstrip().endswith(":")
    found = [(-1, text.strip() if is_word else "")]
    if (box := last_box(text)) is not None:
        found.append((box[0], (final_answer(box[2]) if _STATED.search(box[2]) else "") or box[2]))
    remark = ""
    for match in reversed(list(_STATED.finditer(text))):
        if box is not None and box[0] < match.start() < box[1]:
            continue
        is_prose = match[0].rstrip(" \t*").lower().endswith(("is", "are", "be"))
        answer = _behind(text, match.end(), is_prose=is_prose)
        if is_prose and _REMARKED.match(answer):
            remark = remark or answer
        elif answer:
            found.append((match.start(), answer))
            break
    last = text.rstrip()
    for match in reversed(list(_HASHES.finditer(text))):
        stated = match[1].strip()
        ends = match.end() >= len(last)
        if stated and not _HEADING.match(stated) and (ends or re.match(r"[-+$€£]?\.?\d", stated)):
            found.append((match.start(), stated))
            break
    if (letter := _LETTER_A.search(text)) and not _OTHER_OPTION.search(text):
        found.append((letter.start(1), letter[1]))
    for match in _CALLED_CORRECT.finditer(text):
        found.append((match.end() - 1, match[1] or match[2]))
    if concluded := _CONCLUDED.search(text):
        found.append((concluded.start(1), " and ".join(re.findall("[A-J]", concluded[1]))))
    # A box inside a statement stands behind its start, and so is the answer.
    _, answer = max(found, key=lambda one: one[0])
    return _bare(without_remarks(answer or remark)) or None


def without_remarks(answer: str) -> str:
    """Remove reasons behind an answer: "B. Note that A is too small.", "B, since A is small."."""
    match = _REMARK.search(answer)
    return answer[: match.start()] if match else answer


def _tagged(text: str) -> str:
    """Return what stands in the tag that is closed last, or a blank text."""
    last, content = -1, ""
    for left, right in TAGS:
        end = text.rfind(right)
        start = text.rfind(left, 0, max(end, 0))
        if start >= 0 and last < end and (tagged := text[start + len(left) : end].strip()):
            last, content = end, tagged
    return content


def _behind(text: str, start: int, *, is_prose: bool) -> str:
    """Return what a statement that ends at ``start`` states, without the layout around it."""
    rest = text[start:].lstrip(" \t*")
    stated = rest.lstrip()
    below = "\n" in rest[: len(rest) - len(stated)]
    if introduction := _INTRODUCTION.match(stated):
        stated = stated[introduction.end() :]
        below = "\n" in introduction[0]
    if rule := _RULE.match(stated):
        stated, below = stated[rule.end() :], True
    if below and stated[:1] == ">":
        stated = re.sub(r"^>[ \t]*", "", stated, flags=re.MULTILINE)
    if fence := _FENCE.match(stated):
        return (fence[2] or fence[3] or "").strip()
    if display := _DISPLAY.match(stated):
        return _typeset((display[1] or display[2] or display[3]).strip())
    if environment := _ENVIRONMENT.match(stated) or _OBJECT.match(stated):
        return _typeset(environment[0])
    line = _FILLER.sub("", _listed(stated, below=below), count=1)
    line = _ITEM.sub("", line, count=1) if _ITEM.match(line) else line
    opened = text[text.rfind("\n", 0, start) + 1 : start].count('"') % 2
    if opened and line.count('"') % 2:
        line = line.partition('"')[0]
    line = _within(text[text.rfind("\n", 0, start) + 1 : start], line)
    none = _ELSEWHERE.match(line) or (is_prose and _NO_ANSWER.match(line))
    return "" if none else line.lstrip(":： \t")


def _within(before: str, line: str) -> str:
    """Cut off a line where what stands around the statement ends: "(Answer: 5)", "$answer=5$"."""
    dollar = re.search(r"(?<!\\)\$", line)
    is_formula = len(re.findall(r"(?<!\\)\${1,2}", before)) % 2
    if is_formula and dollar and dollar.start() and not line[dollar.end() :][:1].isdigit():
        line = line[: dollar.start()]
    opened = sum(map(before.count, "([")) - sum(map(before.count, ")]"))
    depth = 0
    for index, character in enumerate(line if opened > 0 else ""):
        depth += (character in "([") - (character in ")]")  # [2, 5) is closed, too.
        if depth < 0:
            return line[:index]
    return line


def _typeset(text: str) -> str:
    r"""Return the rows of an environment, or the last one of a derivation, "x &= 2+3 \\ &= 5"."""
    match = _ENVIRONMENT.match(text)
    if match is None:
        return " ".join(text.split())
    if "\\begin{" in match[2]:  # A matrix has rows of its own.
        return match[2].strip()
    rows = [" ".join(_UNPRINTED.sub(" ", row).split()) for row in _ROW.split(match[2])]
    rows = [row for row in rows if row]
    if rows and rows[-1][0] == "=":
        return rows[-1][1:].strip()
    return ", ".join(row.rstrip(".,;") for row in rows)


def _listed(stated: str, *, below: bool) -> str:
    """Return the first line, or the items of a list that starts with it.

    Args:
        stated: What stands behind the statement.
        below: Whether it starts on a line of its own, so that "- 5" is an item.
    """
    lines = stated.split("\n")
    kind = _item(lines[0], below=below)[0]
    if not kind:
        return lines[0]
    items: list[str] = []
    labels: list[str] = []
    for line in map(str.strip, lines):
        other, label, content = _item(line, below=below)
        if not line and below:
            continue
        if other != kind or (labels and label and label <= labels[-1]):
            break
        if items and (len(content) > _LONGEST_ITEM or _SENTENCE.match(content)):
            break
        items.append(content if not label else line)
        labels.append(label)
    if len(items) == 1 and kind.isdigit():
        return _item(items[0], below=below)[2]
    return ", ".join(items)


def _item(line: str, *, below: bool) -> tuple[str, str, str]:
    """Return the kind of mark in front of an item, its number or letter, and the text behind."""
    if below and (bullet := _BULLET.match(line)):
        return bullet[1], "", line[bullet.end() :]
    label = _LABEL.match(line)
    if label is None or (label[1] and not below):
        return "", "", line
    if label[1]:
        return "0", line.partition(label[1])[0].zfill(2), line[label.end() :]
    return f"{label[2]}{label[4]}{label[3].isupper()}", label[3], line[label.end() :]


def _bare(answer: str) -> str:
    answer = answer.strip()
    if answer.startswith("*") or answer.endswith(("*", "*.")):
        answer = answer.strip("*").removesuffix(".").strip("*").strip()
    if not answer.strip(". …"):
        return ""
    return re.sub(r"(?<!\.)\.$|[。．]$", "", answer).strip()
