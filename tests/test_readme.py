"""What README, CONTRIBUTING and docs/ say can be run, runs; their figures are those of results/."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.command_line import make_parser
from recipes.evidence.smollm2.__main__ import table as check_table
from tests.tiny_task import task

__all__ = ["task"]

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())


def blocks_of(text: str) -> str:
    """Content of the code blocks of a page, continued lines joined."""
    parts = re.split(r"^```(\w*)\n", text, flags=re.MULTILINE)
    # parts: text, language of an opening fence, its content, "" of the closing fence, text, ...
    return "\n".join(parts[2::4]).replace("\\\n", " ")


def snippets(page: str) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def spans_of(text: str) -> list[str]:
    """Code spans of a page, line breaks in them as spaces."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def results(name: str) -> dict | list:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def rows_of(page: str, header: str) -> list[list[str]]:
    """Cells of the rows of the table of a page whose header begins so."""
    lines = PAGES[page].split(f"\n{header}")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_core_snippet_runs_and_its_audit_agrees():
    _, snippet = snippets("README.md")
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    assert namespace["info"].weights.shape == (64,)
    from bilevel import check_hypergradient

    solver, state = namespace["solver"], namespace["state"]
    assert solver.hypergradient.order == "lower-first"
    double = [
        {name: value.double() for name, value in params.items()}
        for params in (state.lower_params, state.upper_params)
    ]
    to_double = lambda batch: {  # noqa: E731
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.items()
    }
    fresh = solver.init(*double)
    for _ in range(3):
        fresh, _ = solver.step(fresh, [to_double(namespace["train"])])
    check = check_hypergradient(
        solver, fresh, [to_double(namespace["train"])], to_double(namespace["clean"])
    )
    assert check, check.message


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 150
    assert all(len(snippet.splitlines()) <= 20 for snippet in snippets("README.md"))


def parse(words: list[str]) -> None:
    with (
        contextlib.suppress(SystemExit)
        if words[-1] in ("--help", "--version")
        else (contextlib.nullcontext())
    ):
        make_parser().parse_args(words)


def test_every_command_line_parses():
    lines = [line.strip() for line in blocks_of(EVERYTHING).splitlines()]
    lines = [line for line in lines if line.startswith("bilevel-prm ")]
    assert len(lines) >= 10
    for line in lines:
        parse(line.split("#")[0].split()[1:])


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for inner in parsers(parser) for flag in inner._option_string_actions}


def command(words: list[str]) -> argparse.ArgumentParser:
    """The parser of the command that these words begin with."""
    parser = make_parser()
    for word in words:
        kinds = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not kinds or word.startswith("-"):
            break
        assert word in kinds[0].choices, f"no command {word!r}"
        parser = kinds[0].choices[word]
    return parser


def test_commands_and_options_in_the_text_exist():
    for page, text in PAGES.items():
        for span in spans_of(text):
            words = span.split()
            if words[0] == "bilevel-prm":
                known = options(command(words[1:]))
            elif words[0].startswith("--"):
                known = options(make_parser())
            else:
                continue
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known, f"{page}: {span}: {used - known}"


def test_every_option_of_the_option_table_is_one_of_training():
    train = options(command(["train"]))
    cells = [row[1] for row in rows_of("docs/dreamprm.md", "| theirs (default) | ours")]
    named = {flag for cell in cells for flag in re.findall(r"`(--[a-z-]+)", cell)}
    assert len(named) > 30
    assert named <= train


def test_presets_exist():
    for row in rows_of("docs/dreamprm.md", "| presets"):
        for name in re.findall(r"`([a-z-]+)`", row[0]):
            assert (ROOT / "recipes" / "presets" / f"{name}.yaml").is_file(), name


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    code = blocks_of(EVERYTHING) + "\n" + "\n".join(spans_of(EVERYTHING))
    targets = set(re.findall(r"\bmake ([a-z0-9-]+)", code))
    assert {"train-net", "test", "help", "docs", "compare", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


FOLDERS = ("bilevel", "weighting", "prm", "recipes", "results", "tests", "docs", "examples")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for span in spans_of(PAGES[page]):
        inside = re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", span)
        if inside or re.fullmatch(r"[\w-]+\.(py|md|cfg|toml)", span):
            assert (ROOT / span).exists(), f"{page}: {span}"
    for module in re.findall(r"python -m ((?:recipes|bilevel|prm)[\w.]*)", PAGES[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Relative links: the file is there, and the heading of an anchor in it."""
    links = re.findall(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)", PAGES[page])
    for target, anchor in links:
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.is_file(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], f"{page}: {target}#{anchor}"


def slug(heading: str) -> str:
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_results_are_those_that_were_written():
    """The table of the results is the one that `compare` made, digit for digit."""
    from recipes.evaluation.table import comparison_table, settings_table

    report = results("compare.json")
    table = comparison_table(report)
    assert table in PAGES["docs/results.md"]
    if report["settings"]:
        assert settings_table(report) in PAGES["docs/results.md"]
    assert comparison_table(results("gate.json")) in PAGES["docs/results.md"]
    header, rule, *rows = table.splitlines()
    shown = README.split(f"{header}\n{rule}\n")[1].split("\n\n")[0].splitlines()
    assert len(shown) <= 8
    assert shown == [row for row in rows if row in shown]  # all are rows of it, in its order


def digits(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def test_costs_are_those_that_were_written():
    """Every row of the table of hypergradients, from the two files of `make bench`."""
    found: dict[tuple[str, int, str, str], dict] = {}
    details = results("bench_details.json")["details"]
    rows = [row for row in results("bench.json") if row["model"].startswith("decoder")]
    for row, detail in zip(rows, details, strict=True):
        assert row["route"].removesuffix(" (out of memory)") == detail["route"]
        found[row["route"], row["unroll_steps"], row["dtype"], detail["batch"]] = row
    names = {
        "(the floor, and its plain gradient)": "floor: lower step + upper gradient",
    }
    rows = rows_of("docs/cost.md", "| route | K |")
    assert len(rows) == 26
    for name, steps, *cells in rows:
        name = names.get(name, name)
        short, half, long = (
            found.get((name, int(steps), dtype, batch), {})
            for dtype, batch in (
                *(("float32", "4 x 256"), ("bfloat16", "4 x 256"), ("float32", "2 x 1024")),
            )
        )
        memory = short["peak_saved_bytes"]
        assert cells == [
            digits(short["overhead_vs_floor"], ".2f"),
            digits(None if memory is None else memory / 1e6, ".0f"),
            digits(short["rel_error"], ".0e"),
            digits(half.get("rel_error"), ".0e"),
            digits(long.get("overhead_vs_floor"), ".2f"),
        ], name


def test_the_race_is_the_one_that_was_run():
    """The table of steps in place beside the original's, from the rows of the same file."""
    found = [row for row in results("bench.json") if row["model"].startswith("InternVL")]
    written = rows_of("docs/cost.md", "| route | model |")
    assert len(written) == len(found)
    for row, (route, model, *cells) in zip(found, written, strict=True):
        _, parameters, batch = row["model"].removeprefix("InternVL, ").rsplit(", ", 2)
        shape, examples = row["model"].split(", ")[1], batch.split()[1]
        assert (route, model) == (
            row["route"],
            f"{shape}, {parameters.removesuffix(' parameters')}",
        )
        assert cells == [
            examples,
            digits(row["cpu_seconds"], ".1f"),
            digits(row["overhead_vs_floor"], ".2f"),
            digits(row["times_faster_than_original"], ".2f"),
            digits(row["peak_bytes"] / 1e9, ".2f"),
            digits(row["copies"], ".1f"),
        ]


def test_the_iteration_of_the_whole_model_is_the_one_that_was_run():
    found = results("bench_full.json")
    text = " ".join(PAGES["docs/cost.md"].split())
    seconds, memory = found["cpu_seconds"], found["peak_resident_bytes"] / 1e9
    assert f"took {seconds:.0f} CPU seconds and {memory:.1f} GB" in text
    assert f"({found['parameters'] / 1e6:.0f} M parameters" in text


def test_copies_are_those_that_were_counted():
    found = results("bench_copies.json")["rows"]
    assert rows_of("docs/cost.md", "| route | the equation needs |") == [
        [
            *(row["route"], row["needs"], str(row["needed"])),
            *(digits(row["functional"], ""), digits(row["resident"], "")),
        ]
        for row in found
    ]


def test_costs_on_the_embedded_model_are_those_that_were_written():
    found = {row["route"]: row for row in results("bench_embedded.json")["rows"]}
    names = {"(lower step alone)": "lower step", "(upper gradient alone)": "upper gradient"}
    for name, floor, error, memory in rows_of("docs/cost.md", "| route | × floor | relative"):
        row = found[names.get(name, name)]
        assert floor == digits(row.get("overhead_vs_floor"), ".2f"), name
        assert error == digits(row.get("rel_error"), ".0e"), name
        assert memory == digits(row["peak_memory_mb"], ".0f"), name


def test_speeds_of_scoring_are_those_that_were_written():
    rows = rows_of("docs/cost.md", "| way of scoring")
    for (_, speed, memory), row in zip(rows, results("bench_scoring.json")["rows"], strict=True):
        assert float(speed) == pytest.approx(row["speedup"], abs=0.05)
        assert float(memory) == pytest.approx(row["peak_ratio"], abs=0.005)


def test_growth_with_the_rows_is_what_was_written():
    rows = rows_of("docs/cost.md", "| command | rows |")
    for cells, row in zip(rows, results("bench_growth.json")["rows"], strict=True):
        assert cells == [
            row["command"],
            f"{row['rows']:,}",
            digits(row["cpu_seconds"], ".1f"),
            digits(row["bytes_beyond_model"] / 1e6, ".0f"),
        ]


GROWING = {
    "examples of a batch": "batch",
    "tokens of an example": "tokens",
    "tiles of an example": "tiles",
    "rows of a table, AdamW": "table-adam",
    "rows of a table, `LazyRowAdam`": "table-lazy-adam",
    "rows of a data file": "rows",
    "ranks": "ranks",
    "candidates of `evaluate`": "candidates",
}
GROWN = {
    "step": ("step_ms", "cpu_ms"),
    "memory of a step": ("step_bytes", "peak_bytes"),
    "looked at by the loop": ("judge_ms",),
    "state": ("state_bytes",),
    "checkpoint, time": ("checkpoint_ms",),
    "checkpoint, file": ("checkpoint_bytes",),
    "start and first step": ("cpu_ms",),
    "memory beyond the model": ("bytes_beyond_model",),
    "step, of a rank": ("cpu_ms_of_a_rank",),
    "step, of all ranks": ("cpu_ms",),
    "bytes handed over by a rank": ("sent_bytes",),
    "bytes sent by a rank (derived)": ("ring_bytes",),
    "command": ("cpu_ms",),
    "memory": ("peak_bytes",),
}
UNITS = {"ms": 1, "s": 1000, "MB": 10**6, "GB": 10**9}


def test_exponents_of_growth_are_those_that_were_written():
    found = results("growth.json")
    for name, low, high, figure, largest, *exponents in rows_of("docs/growth.md", "| what grows"):
        axis = found[GROWING[name]]
        fits = axis["fits"]
        (quantity,) = [one for one in GROWN[figure] if one in fits]
        fit = fits[quantity]
        assert [low, high] == [f"{fit['from']:,}", f"{fit['to']:,}"], (name, figure)
        assert exponents == [digits(fit[of], ".2f") for of in ("exponent", "last", "residual")]
        (row,) = [row for row in axis["rows"] if row["size"] == fit["to"]]
        value, unit = largest.split()
        assert value == digits(row[quantity] / UNITS[unit], ".3g"), (name, figure)


def test_accuracies_with_an_upper_gradient_for_several_steps_are_those_that_were_written():
    found = results("growth.json")
    for cells, row in zip(rows_of("docs/growth.md", "| N |"), found["digits"]["rows"], strict=True):
        assert cells == [
            row["upper_gradient_every"],
            digits(100 * row["accuracy"], ".1f"),
            digits(100 * row["standard_error"], ".1f"),
            digits(row["weight_auc"], ".3f"),
            digits(row["cpu_ms_per_step"], ".1f"),
        ]


def test_shards_beside_whole_copies_are_what_was_written():
    measured = results("growth.json")["shards"]["rows"]
    written = rows_of("docs/growth.md", "| θ |")
    for cells, row in zip(written, measured, strict=True):
        copies = [row[name] / row["theta_bytes"] for name in ("held_bytes", "peak_bytes")]
        sent = row["sent_bytes"] / row["theta_bytes"]
        assert cells == [row["kind"], str(row["size"]), *(f"{one:.1f}" for one in (*copies, sent))]
        ranks = row["size"]
        passes = 2 if row["kind"] == "whole" else 6 // ranks + 1
        each = 2 if row["kind"] == "whole" else 3
        assert sent == pytest.approx(passes * each * (ranks - 1) / ranks, rel=0.01)


def test_the_plan_past_one_machine_is_what_was_written():
    from recipes.evidence.growth.plan import table

    forms = ("state_bytes", "flops", "inside_bytes", "outside_bytes")
    scales = ((1e9, ".1f"), (1e15, ".3f"), (1e9, ".0f"), (1e9, ".0f"))
    for cells, row in zip(rows_of("docs/growth.md", "| devices"), table(), strict=True):
        over = "all" if row["across"] == "shards" else "each machine"
        every = row["every"] or "no upper level"
        assert cells[:4] == [str(row["devices"]), over, str(every), str(row["examples"])]
        expected = [digits(row[n] / by, f) for n, (by, f) in zip(forms, scales, strict=True)]
        assert cells[4:8] == expected
        rest = ("computing_seconds", "sending_seconds", "efficiency")
        assert cells[8:11] == [digits(row[name], ".2f") for name in rest]
        assert cells[11] == digits(row["examples_per_second"], ".0f")


def test_other_problems_are_those_that_were_written():
    """Accuracy, AUC and seconds of the rows with wrong labels, mistaken and rare classes."""
    from recipes.problems.noisy_labels import TITLES

    wrong, rare = (results(name)["rows"] for name in ("noisy_labels.json", "long_tail.json"))
    kinds = {title: name for name, title in TITLES.items()}
    for title, *cells in rows_of("docs/problems.md", "| method | wrong labels"):
        first, second = (rows.get(kinds[title], {}) for rows in (wrong, rare))
        assert cells[0] == interval(first.get("test")), title
        assert cells[1] == digits(first.get("weight_auc", {}).get("mean"), ".3f"), title
        assert cells[2] == digits(first.get("seconds", {}).get("mean"), ".1f"), title
        assert cells[5] == interval(second.get("test")), title
        tail = second.get("tail_recall")
        assert cells[6] == digits(None if tail is None else 100 * tail["mean"], ".1f"), title

    mistaken = results("class_noise.json")["rows"]
    shown = rows_of("docs/problems.md", "| method | mistaken classes")
    assert [kinds[title] for title, *_ in shown] == list(mistaken)
    for title, *cells in shown:
        row = mistaken[kinds[title]]
        assert cells == [
            interval(row["test"]),
            interval(row.get("minus_meta_only"), "+"),
            digits(row.get("weight_auc", {}).get("mean"), ".3f"),
        ]


def interval(found: dict | None, sign: str = "") -> str:
    if found is None:
        return ""
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def test_faults_are_those_that_were_counted():
    page = PAGES["docs/reliability.md"]
    chaos, fuzz, soak = (results(f"{name}.json") for name in ("chaos", "fuzz", "soak"))
    assert f"{chaos['kills']} kills in {chaos['runs']} runs" in page
    assert f"{chaos['resumed']} of {chaos['kills']} resumed" in page
    assert chaos["identical"] == chaos["kills"]
    assert f"at most {chaos['lost_steps_max']} steps" in page
    files = [row for row in fuzz["rows"] if row["format"] != "requests"]
    (requests,) = [row for row in fuzz["rows"] if row["format"] == "requests"]
    read, refused = (sum(row[key] for row in files) for key in ("parsed", "refused"))
    assert f"| {read:,} read, {refused:,} refused with line and field" in page
    scored = f"{requests['parsed']:,} scored, {requests['refused']:,} answered in 4xx"
    assert f"| {requests['records']:,} | none | {scored}" in page
    memory = soak["trends"]["rss_mib"]
    slope, low, high = (memory[key] for key in ("slope_per_1000_steps", "low", "high"))
    assert f"memory + {slope:.2f} MiB per 1,000 steps [{low:.2f}, {high:.2f}]" in page


def commands_of(page: str, section: str) -> list[list[str]]:
    """Words of every command of the page's section of that name, in order."""
    text = re.split(rf"\n##+ {section}\n", PAGES[page])[1]
    lines = blocks_of(re.split(r"\n##+ ", text)[0]).splitlines()
    return [line.split()[1:] for line in lines if line.startswith("bilevel-prm ")]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_users_files_become_selected_answers(task, tmp_path, monkeypatch):
    """The commands, word for word, but for the model and for shorter training."""
    shutil.copytree(task.data, tmp_path, dirs_exist_ok=True)
    candidates = lines_of(tmp_path / "test.jsonl")
    for row in candidates:
        del row["correct"], row["answer"]
        row["steps"] = [{"text": step["text"]} for step in row["steps"]]
    text = "".join(json.dumps(row) + "\n" for row in candidates)
    (tmp_path / "candidates.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "2", "--batch-size", "6", "--no-progress"]
    added = {
        "cold-start": [*short, "--draw", "6"],
        "train": [*short, "--upper-start", "1", "--meta-batch-size", "6"],
    }
    commands = commands_of("README.md", "From your files to selected answers")
    commands += commands_of("docs/use.md", "Measure and weigh")
    assert [words[0] for words in commands] == [
        *("data", "cold-start", "train", "score", "select", "evaluate", "weigh")
    ]
    for command in commands:
        words = [str(task.model) if word.startswith("OpenGVLab/") else word for word in command]
        assert main([*words, *added.get(words[0], [])]) == 0, " ".join(words)
    run_snippets(task, tmp_path)
    scores, selected = lines_of(tmp_path / "scores.jsonl"), lines_of(tmp_path / "selected.jsonl")
    asked = dict.fromkeys(row["group"] for row in candidates)
    assert [row["group"] for row in selected] == list(asked)
    for best in selected:
        among = {r["id"]: r["scores"]["mean"] for r in scores if r["group"] == best["group"]}
        assert best["score"] == max(among.values()) == among[best["id"]]
        assert best["tied"] == [name for name, score in among.items() if score == best["score"]]


def run_snippets(task, folder: Path) -> None:
    """The snippet for programs in the README, and those of the page on them, in their order."""
    (folder / "sheets").mkdir(exist_ok=True)
    shutil.copy(next(task.data.rglob("*.png")), folder / "sheets" / "17.png")
    namespace: dict = {}
    for code in (snippets("README.md")[0], *snippets("docs/programs.md")):
        exec(compile(code, "docs/programs.md", "exec"), namespace)
    scorer, solutions, outputs = (namespace[n] for n in ("scorer", "solutions", "outputs"))
    asked, images = [namespace["question"]] * 2, [namespace["images"]] * 2
    assert [len(steps) for steps in namespace["step_scores"]] == [2, 2]
    assert namespace["best"] in solutions
    first, second = (one.score for one in scorer.judge(asked, solutions, images))
    assert namespace["rewards"] == pytest.approx([first, second], abs=1e-6)
    assert namespace["score"] == pytest.approx(first, abs=1e-6)
    assert namespace["result"]["score"] == pytest.approx(first, abs=1e-6)
    (unseen,) = namespace["steps"]
    assert unseen == scorer.score(asked, [output.split("\n\n") for output in outputs])


def test_the_check_with_real_weights_is_the_one_that_was_written():
    assert check_table(results("game24.json")) in PAGES["docs/results.md"]
