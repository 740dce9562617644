r"""Find the final answer in the text of a solution.

Five kinds of statement are known; the last one in the text counts:

1. ``\boxed{...}`` and ``\fbox{...}``;
2. "Answer: ...", "The answer is ...", "The correct option is ...", also with emphasis, with
   "Ans:", and as a heading over the answer;
3. ``#### ...`` as in GSM8K, unless it is a heading of Markdown;
4. "A: ..." as the last line;
5. "Option B is correct." and "B is the correct answer." as a sentence.

What stands in ``<answer>...</answer>`` is all that counts.
"""

from __future__ import annotations

import re

from prm.evaluation.latex import last_box

# The quantifiers are possessive, so that a long run of white space is matched in linear time.
_GAP = r"[ \t]*+(?:\*{1,2}+[ \t]*+)?"
_STATED = re.compile(
    rf"(?:\b(?:answers?|ans|antwort|réponse|respuesta|risposta)|ответ|答案|答え|정답){_GAP}[:：=]"
    r"|\bans\.(?=[ \t])"
    rf"|\banswers?{_GAP}(?:to[ \t](?:the|this)[ \t]\w{{1,20}}{_GAP})?(?:is|are)\b{_GAP}[:：]?"
    rf"|\b(?:answers?{_GAP}(?:would|should|must|will)[ \t]be|final[ \t]answer[ \t]of)\b"
    r"(?=[ \t]*+[-+$\\(\[*]*+(?:\.?\d|[A-J]\b|[a-z]+\{))"
    r"|答案[是为][:：]?"
    rf"|\b(?:correct|right|best)[ \t](?:option|choice){_GAP}is\b{_GAP}[:：]?"
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
_ITEM = re.compile(r"[-•*]\s+(?=[(\[]?[A-J][)\]]?[.:]?(?:\s|$))")
_DISPLAY = re.compile(r"\s*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])", re.DOTALL)
_OPTION = r"[A-J](?:[.):,;&]|\s*$|\s+(?:and\b|or\b|&))"
"""A letter that is set off as the one of an option is, and no article or subject of a sentence."""
_REMARK = re.compile(
    r"[.;!?](?:\*{1,2}|\$)?\s+(?=(?:I hope|Note|This|That is|These|Therefore|So|Thus|Hence|Because|"
    r"Since|The|We|It|However|In|For|If|Let|Here|Please|Also|Explanation|Reason)\b)"
    rf"|(?:(?<=[\d$}})%°\]*])[.;!]|(?<=^[A-Z])[.!])\s+(?!{_OPTION})(?=[A-Z][a-z]*\b(?!\.))"
    r"|(?<=[^\s,]),?\s++(?:because|since)\b"
)


def final_answer(text: str) -> str | None:
    r"""Return the final answer of a solution, or else a reply of a single word; None without one.

    Emphasis, a full stop, and sentences behind the answer ("I hope it is correct.") are removed;
    otherwise it is not normalised.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if 0 <= start < end and (tagged := text[start + len("<answer>") : end].strip()):
        return final_answer(tagged) or _bare(without_remarks(tagged)) or None
    is_word = len(text.split()) == 1 and "boxed" not in text and not text.rstrip().endswith(":")
    found = [(-1, text.strip() if is_word else "")]
    if (box := last_box(text)) is not None:
        found.append(box)
    for match in reversed(list(_STATED.finditer(text))):
        is_prose = match[0].rstrip(" \t*").lower().endswith(("is", "are", "be"))
        if answer := _behind(text, match.end(), is_prose=is_prose):
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
    # A box inside a statement stands behind its start, and so is the answer.
    _, answer = max(found, key=lambda one: one[0])
    return _bare(without_remarks(answer)) or None


def without_remarks(answer: str) -> str:
    """Remove reasons behind an answer: "B. Note that A is too small.", "B, since A is small."."""
    match = _REMARK.search(answer)
    return answer[: match.start()] if match else answer


def _behind(text: str, start: int, *, is_prose: bool) -> str:
    """Return what a statement that ends at ``start`` states: the rest of its line, or the next."""
    rest = text[start:].lstrip(" \t*").lstrip()
    if display := _DISPLAY.match(rest):
        return (display[1] or display[2]).strip()
    line = _FILLER.sub("", rest.partition("\n")[0], count=1)
    line = _ITEM.sub("", line, count=1) if _ITEM.match(line) else line
    return "" if is_prose and _NO_ANSWER.match(line) else line.lstrip(":： \t")


def _bare(answer: str) -> str:
    answer = answer.strip()
    if answer.startswith("*") or answer.endswith(("*", "*.")):
        answer = answer.strip("*").removesuffix(".").strip("*").strip()
    if not answer.strip(". …"):
        return ""
    return re.sub(r"(?<!\.)\.$|[。．]$", "", answer).strip()
