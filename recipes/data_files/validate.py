"""``data validate``: read every record, continue after errors, and report on one page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prm.data.bad_rows import BadRows
from prm.data.image_files import ImageFiles
from prm.data.reader import Row, image_errors, iter_rows, repeated_id
from prm.schema import DataError, StepExample
from recipes.bad_rows import bad_rows_of
from recipes.data_files.findings import Findings, Tally, location_of, spread
from recipes.data_files.options import ValidateOptions
from recipes.data_files.overlap import Overlap, Rows, overlaps
from recipes.options.base import PrmOptions
from recipes.options.rules import check_together
from recipes.options.values import existing_file
from recipes.terminal import printable

_MISTAKES_SHOWN = 10
_LINES_SHOWN = 5
Measure = Callable[[StepExample], tuple[int, int]]


def validate(options: ValidateOptions) -> tuple[str, dict[str, Any]]:
    """Check the files of ``options``; return the report and the figures for JSON.

    The figures of the files are at the top level, those of ``--meta`` and ``--test`` below ``meta``
    and ``test``. ``errors`` holds the errors of all sets, ``leaks`` the pairs of sets that share a
    question, and ``usable`` says whether commands would take the files. Memory: about 400 bytes a
    row.

    Raises:
        OptionError: A file or the model does not exist.
    """
    sets = {"train": options.files}
    sets |= {name: (path,) for name in ("meta", "test") if (path := getattr(options, name))}
    for path in (path for paths in sets.values() for path in paths):
        existing_file(path)
    check_together(options)
    measure = None if options.model is None else _measure(options)
    findings_of = {}
    for name, paths in sets.items():
        findings = findings_of[name] = Findings(compared=len(sets) > 1)
        for path in paths:
            _scan(Path(path), options, findings, measure)
    figures = findings_of["train"].figures()
    page = "\n\n".join(_page(findings, options) for findings in findings_of.values())
    for name, findings in list(findings_of.items())[1:]:
        figures[name] = findings.figures()
        figures["errors"] = figures["errors"] + figures[name]["errors"]
    if len(findings_of) > 1:
        shared = overlaps(findings_of, {name: _rows(sets[name], options) for name in findings_of})
        figures["shared"] = {
            f"{pair.first}_{pair.second}": {
                "questions": pair.questions.count,
                "solutions": pair.solutions.count,
            }
            for pair in shared
        }
        page += "\n\n" + "\n".join(_shared(pair, findings_of) for pair in shared)
        figures["leaks"] = [
            f"{pair.first}_{pair.second}" for pair in shared if pair.questions.count
        ]
    page += "\n\n" + _mistakes(findings_of, figures.get("leaks", []))
    figures["usable"] = not figures["errors"]
    if options.on_bad_row == "skip" and figures["errors"]:
        bad = [bad for findings in findings_of.values() for bad in findings.bad if bad.left_out]
        too_many = list(filter(None, map(_too_many, bad)))
        figures["usable"] = not too_many
        page += "\n" + "\n".join([*map(str, bad), *too_many])
    return page, figures


def _too_many(bad: BadRows) -> str | None:
    try:
        bad.check()
    except DataError as error:
        return str(error)
    return None


def _scan(
    path: Path, options: ValidateOptions, findings: Findings, measure: Measure | None
) -> None:
    findings.start(path)
    root = path.parent if options.image_root is None else Path(options.image_root)
    images = ImageFiles(root, allow_outside=options.allow_outside_images, check=options.images)
    format, rows = "unknown", findings.rows
    bad = bad_rows_of(options, path) if options.on_bad_row == "skip" else None
    for row in iter_rows(path, root, format=options.format, tell=findings.notes.append):
        if isinstance(row, DataError):
            findings.row(row.line or 0, None)
            findings.mistake(row)
            if bad is not None:
                bad.add(row)
            continue
        format = row.format
        findings.row(row.line, row.record)
        usable = 0
        for example in row.examples:
            findings.example(row.line, example)
            wrong = _check(row, example, path, findings, images, measure)
            usable += wrong is None
            if wrong is not None and bad is not None:
                bad.add(wrong, example.id)
        if bad is not None:
            bad.count(row.line, usable)
    findings.formats.append(format)
    if bad is not None:
        bad.rows = findings.rows - rows
        findings.bad.append(bad)
    if findings.rows == rows:
        findings.mistake(DataError(expected="at least one row", found="an empty file", file=path))
    findings.images.update(problem.fault for problem in images.problems.values())
    findings.images["checked"] += images.count


def _check(
    row: Row,
    example: StepExample,
    path: Path,
    findings: Findings,
    images: ImageFiles,
    measure: Measure | None,
) -> DataError | None:
    """Check an example against the others, and its images; return the first error, if any."""
    location = findings.location(row.line)
    first = findings.first_named(example.id, location)
    errors = []
    if first != location:
        errors.append(repeated_id(example.id, path, row.line, findings.shown(first)))
    of_images = list(image_errors(row, example, images, path))
    errors += of_images
    if of_images:
        findings.image_rows.add(location)
    elif measure is not None:
        try:
            findings.measured(location, *measure(example))
        except DataError as error:
            error.line = row.line
            errors.append(error)
    for mistake in errors:
        findings.mistake(mistake)
    return errors[0] if errors else None


def _measure(options: ValidateOptions) -> Measure:
    from recipes.models.loading import load_model

    asked = PrmOptions(model=str(options.model), max_patches=options.max_patches)
    collator = load_model(asked)[0].collator()

    def measure(example: StepExample) -> tuple[int, int]:
        encoded = collator.encode(example)
        return len(encoded.input_ids), sum(encoded.tile_counts)

    return measure


def _rows(paths: Sequence[str], options: ValidateOptions) -> list[Rows]:
    """Return a generator per file, for a second pass."""

    def rows(number: int, path: Path) -> Rows:
        root = path.parent if options.image_root is None else Path(options.image_root)
        for row in iter_rows(path, root, format=options.format):
            if not isinstance(row, DataError):
                for example in row.examples:
                    yield location_of(number, row.line), example

    return [rows(number, Path(path)) for number, path in enumerate(paths)]


def _shared(pair: Overlap, findings_of: Mapping[str, Findings]) -> str:
    findings = findings_of[pair.second]
    names = findings.names_shared(findings_of[pair.first])
    text = f"{pair.second} and {pair.first} share "
    if not pair.questions.count:
        return text + "no question" + (f", but {names:,} ids" if names else "")
    text += f"the questions of {pair.questions.count:,} solutions of {pair.second}"
    text += _first(pair.questions, findings)
    if pair.solutions.count:
        text += f"; {pair.solutions.count:,} of the solutions themselves"
        text += _first(pair.solutions, findings)
    return text


def _page(findings: Findings, options: ValidateOptions) -> str:
    """Return the report on one set, without lines for findings that did not occur."""
    named = zip(findings.files, findings.formats, strict=True)
    files = ", ".join(f"{printable(path)} ({name})" for path, name in named)
    rows, examples = findings.rows, findings.examples
    lines = [f"{files}: {rows:,} rows, {examples:,} solutions, {findings.steps:,} steps"]
    lines += [f"  {printable(note)}" for note in findings.notes]

    def add(name: str, tally: Tally | int, text: str, of: int = 0) -> None:
        count = tally if isinstance(tally, int) else tally.count
        if count:
            share = f" ({100 * count / of:.1f} %)" if of else ""
            where = "" if isinstance(tally, int) else _first(tally, findings)
            lines.append(f"  {name:<22}{count:>9,}{share:<10} {text}{where}")

    add("errors", findings.bad_rows, "rows that cannot be used, or not whole; see below", rows)
    if findings.constant_id:
        text = "all rows have the same id"
        if findings.placeholder_ids:
            text += ", a filler: examples are named by row"
        add("constant id", findings.rows, text)
    else:
        add("repeated ids", findings.duplicate_ids, "rows whose id an earlier row has", rows)
    add("one-step rows", findings.one_step, "solutions of a single step", examples)
    add("one-word steps", findings.one_word_steps, "steps of a single word", findings.steps)
    add("duplicates", findings.duplicates, "same as an earlier one in all but the id", examples)
    add(
        "contradictions",
        findings.contradictions,
        "same steps as an earlier one, opposite labels",
        examples,
    )
    add(
        "contradictory outcomes",
        findings.contradictory_outcomes,
        "same answer to the same question as an earlier one, and `correct` is not the same",
        examples,
    )
    add("unjudged", findings.unjudged, "neither a label nor an outcome", examples)
    add(
        "mixed up groups",
        findings.mixed_up_groups,
        "solutions of another question than the first of their group",
        examples,
    )
    add(
        "groups alike",
        findings.groups_alike,
        "groups that are another one but for case, white space or Unicode form; they count as two",
    )
    images = findings.images
    add("images", images["checked"], f"different files named, checked: {options.images}")
    for fault in ("missing", "unreadable", "outside"):
        add(f"  {fault}", images[fault], "of them")
    add("  rows concerned", findings.image_rows, "solutions with such an image", examples)
    add("image count", findings.image_mismatches, "other number of <image> marks than of images")
    lines.append("  labels                " + _counts(findings.labels, findings.steps))
    if findings.groups:
        lines.append("  outcomes              " + _counts(findings.outcomes, examples))
        share = 100 * findings.mixed_groups / findings.groups
        lines.append(
            f"  questions             {findings.groups:>9,} with outcomes; "
            f"{findings.mixed_groups:,} ({share:.1f} %) have right and wrong solutions"
        )
    for name, values in (("tokens", findings.lengths), ("tiles", findings.tiles)):
        if values:
            figures = spread(values)
            text = f"per solution: median {figures['median']:,}, 95 % {figures['p95']:,}, "
            add(name, sum(values), text + f"most {figures['max']:,}")
    return "\n".join(lines)


def _first(tally: Tally, findings: Findings) -> str:
    if not tally.first:
        return ""
    more = ", ..." if tally.count > len(tally.first) else ""
    return "; at " + ", ".join(findings.shown(location) for location in tally.first) + more


def _counts(counts: Mapping[str, int], total: int) -> str:
    parts = [
        f"{name} {count:,} ({100 * count / total:.1f} %)" for name, count in counts.items() if count
    ]
    return ", ".join(parts) or "none"


def _mistakes(findings_of: Mapping[str, Findings], leaks: Sequence[str]) -> str:
    """Return the errors, those of equal text together, and the leaks."""
    alike: dict[tuple[str, str | None, str], list[int | None]] = defaultdict(list)
    for findings in findings_of.values():
        for mistake in findings.errors:
            alike[mistake.file, mistake.field, mistake.message].append(mistake.line)
    lines = []
    if alike:
        rows = sum(findings.bad_rows for findings in findings_of.values())
        lines.append(f"errors in {_counted(rows, 'row')}")
    for (file, field, message), at in list(alike.items())[:_MISTAKES_SHOWN]:
        location = file if at[0] is None else f"{file}:{at[0]}"
        more = (
            "" if len(at) == 1 else f" (and {_counted(len(at) - 1, 'more row')}: {_list(at[1:])})"
        )
        lines.append(f"  {location}{more}{f': field {field}' if field else ''}: {message}")
    if len(alike) > _MISTAKES_SHOWN:
        lines.append(f"  ... and {len(alike) - _MISTAKES_SHOWN:,} others; --json FILE lists all")
    if leaks:
        pairs = ", ".join(pair.replace("_", " and ") for pair in leaks)
        lines.append(
            f"a leak: {pairs} share questions; take them out of one of the two, or divide one file "
            "by `bilevel-prm data split`"
        )
    return "\n".join(lines) or "no errors"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _list(lines: Sequence[int | None]) -> str:
    shown = ", ".join(f"{line}" for line in lines[:_LINES_SHOWN])
    return shown + (", ..." if len(lines) > _LINES_SHOWN else "")
