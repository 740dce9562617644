"""The command line: quick help, and every mistake in one line that says what to change."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
import torch

import recipes.run.provenance
import recipes.train.loop
import recipes.train.training
from recipes.__main__ import main
from recipes.run.provenance import environment
from recipes.run.step_log import append_line
from tests.tiny_task import altered, model_bits, read_lines

COMMANDS = [
    [],
    ["cold-start"],
    ["train"],
    ["score"],
    ["select"],
    ["evaluate"],
    ["weigh"],
    ["convert-model"],
    ["compare"],
    ["env"],
    ["data"],
    ["data", "embedded"],
    ["data", "pretrain-base"],
]
SHORT = "--steps 2 --batch-size 4 --log-every 1 --no-progress"
UPPER = "--meta-batch-size 4 --upper-start 0"


@pytest.fixture
def train(task, tmp_path):
    """Run ``train`` on the tiny task, with an upper level if weighted; what comes later wins."""

    def run(*words: str) -> int:
        files = [
            *("--model", str(task.model), "--system-prompt", "judge each step of the solution"),
            *("--train-file", str(task.data / "train.jsonl")),
            *("--output-dir", str(tmp_path / "run")),
            "--allow-outside-images",
        ]
        meta = ["--meta-file", str(task.data / "meta.jsonl"), *UPPER.split()]
        upper = [] if "--weighting none" in " ".join(words) else meta
        return main(["train", *files, *SHORT.split(), *upper, *words])

    return run


@pytest.fixture
def said(capsys):
    """What the command said on standard error: progress bars apart, one line without traceback."""

    def line() -> str:
        lines = [text for text in capsys.readouterr().err.splitlines() if "it/s]" not in text]
        assert len(lines) == 1
        return lines[0]

    return line


def usage_error(words, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words) or "none")
def test_help_answers_at_once(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-m", "recipes", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0
    assert done.stdout.startswith(" ".join(["usage: bilevel-prm", *command]))
    assert done.stderr == ""


def test_help_says_default_and_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--weighting {net,table,domain,labels,none}" in text
    assert "lower-level optimizer steps (default: 300)" in text
    assert "JSONL with step labels (required)" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "trian",
            "bilevel-prm: unknown command 'trian'; did you mean 'train'?; expected cold-start, "
            "train, score, select, evaluate, weigh, relabel, serve, parity, convert-model, "
            "compare, weights, report, push, env, data, runs",
        ),
        (
            "data valdate x",
            "bilevel-prm: unknown command 'valdate'; did you mean 'validate'?; expected embedded, "
            "pretrain-base, validate, convert, inspect, split",
        ),
        (
            "runs shw",
            "bilevel-prm: unknown command 'shw'; did you mean 'show'?; expected show, list",
        ),
        (
            "train --weighting tabel",
            "bilevel-prm train: --weighting: expected one of net, table, domain, "
            "labels, none; found 'tabel'; did you mean 'table'?",
        ),
        (
            "data convert x --to stepwize --out y",
            "bilevel-prm data convert: --to: expected one of prm-jsonl, stepwise; "
            "found 'stepwize'; did you mean 'stepwise'?",
        ),
    ],
)
def test_unknown_commands_and_choices_are_named_with_the_nearest(words, line, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "bilevel-prm: the following arguments are required: command; see bilevel-prm --help"),
        (
            ["train", "--steps"],
            "bilevel-prm train: argument --steps: expected one argument; "
            "see bilevel-prm train --help",
        ),
    ],
)
def test_arguments_that_cannot_be_parsed_end_in_one_line(words, line, capsys):
    assert usage_error(words, capsys) == line + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train --batch-sise 3",
            "train: unknown option --batch-sise; did you mean '--batch-size'?",
        ),
        (
            "train --batch_sise=3",
            "train: unknown option --batch_sise; did you mean '--batch-size'?",
        ),
        ("train --steps 3 more", "train: unexpected argument 'more'; see --help"),
        ("runs show x --jsn", "runs show: unknown option --jsn; did you mean '--json'?"),
        ("data split f --prats a=1", "data split: unknown option --prats; did you mean '--parts'?"),
        ("runs list nowhere", "runs list: nowhere: no such folder"),
    ],
)
def test_unknown_options_are_named_with_the_nearest(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("batch_sise: 3\n", "unknown option 'batch_sise'; did you mean 'batch_size'?"),
        ("bound: sigmod\n", "found 'sigmod'; did you mean 'sigmoid'?"),
        ("steps: -1\n", "--steps: expected 0 or more, found -1"),
    ],
)
def test_mistakes_in_a_preset_end_in_2(train, said, tmp_path, preset, message):
    (tmp_path / "mine.yaml").write_text(preset)
    # What the command line says wins, so the preset speaks alone here.
    words = ["train", "--config", str(tmp_path / "mine.yaml")]
    assert main([*words, "--train-file", "t", "--output-dir", "o"]) == 2
    line = said()
    assert line.startswith("bilevel-prm train: ")
    assert line.endswith(message)


def test_required_options_are_named(said):
    assert main(["train"]) == 2
    assert said() == (
        "bilevel-prm train: missing --train-file, --output-dir; "
        "give it on the command line or in the preset"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train-file ./none.jsonl", "./none.jsonl: no such file; check the path"),
        ("--meta-file ./none.jsonl", "./none.jsonl: no such file; check the path"),
        ("--test-file ./none.jsonl", "./none.jsonl: no such file; check the path"),
        ("--model ./none", "--model ./none: expected a checkpoint folder"),
        ("--model embedded --init-from runs/none", "--init-from runs/none: expected a checkpoint"),
        ("--model embedded --init-from ./none", "--init-from ./none: expected a checkpoint folder"),
        ("--weighting none --weights-file ./none.jsonl", "--weights-file ./none.jsonl: no such"),
        ("--freeze visual_tower", "--freeze: expected names of parts of the model, found 'visual"),
        ("--features surprise", "--features: expected among p_plus, p_minus, label, p_label, loss"),
        ("--batch-size 1", "the only example of --batch-size 1 always gets the same weight"),
        ("--prior 2.5", "Choose a prior inside that range or another bound"),
        ("--weighting domain --bound clip", "use softplus or sigmoid"),
        ("--normalise table", "--normalise table --weighting net: a net has no table"),
        ("--upper-optimizer lazy-adam", "use adam, or --weighting table"),
        ("--upper-lr fast", "--upper-lr: expected auto or a number, found 'fast'"),
        ("--upper-lr -1", "--upper-lr: expected 0 or more, found -1"),
        ("--lower-lr nan", "--lower-lr: expected float, found 'nan'"),
        ("--lower-betas 0.9 1", "betas[1] must lie in [0, 1), got 1.0"),
        ("--direction-decay 1", "direction_decay must lie in [0, 1), got 1.0"),
        ("--route dot", "--route dot --batch-size 4: dot takes one example per"),
        ("--route ghost --order lower-first", "use --order upper-first, or --route per-example"),
        ("--lower-data meta", "--lower-data meta has no effect with --weighting net"),
        ("--meta-file none", "the meta loss needs --meta-file"),
        (
            "--weighting none --meta-file {meta} --lower-data meta --weights-file w",
            "--weights-file w has no effect with --lower-data meta",
        ),
        *(
            (f"--{name} 0", f"--{name}: expected 1 or more, found 0")
            for name in (
                "batch-size",
                "accumulation",
                "meta-batch-size",
                "unroll-steps",
                "log-every",
                "eval-batch-size",
                "max-patches",
            )
        ),
        ("--seed -1", "--seed: expected 0 or more, found -1"),
        ("--threads -1", "--threads: expected 0 or more, found -1"),
    ],
)
def test_options_that_cannot_be_used_end_in_2(task, train, said, tmp_path, words, message):
    assert train(*words.format(meta=task.data / "meta.jsonl").split()) == 2
    assert message in said()
    assert not (tmp_path / "run").exists()


def breaking(field, value):
    def change(place, row):
        return row | {field: value} if place == 2 else row

    return change


def unknown_label(place, row):
    if place == 2:
        row["steps"][1]["label"] = "good"
    return row


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (breaking("steps", []), "steps", "expected at least one step, found an empty list"),
        (breaking("id", "train-0000-0"), "id", "give every example its own id"),
        (breaking("images", ["gone.png"]), "images[0]", "check the path; image paths are relative"),
        (breaking("question", 7), "question", "expected a"),
        (unknown_label, "steps[1].label", "found the string 'good'"),
        (breaking("steps", [{"text": "A1= 3", "label": None}]), "steps[].label", "label a step"),
    ],
    ids=["no steps", "id twice", "no image", "question", "label", "no label"],
)
def test_records_that_cannot_be_used_end_in_1(task, train, said, tmp_path, change, field, message):
    broken = altered(task.data / "train.jsonl", tmp_path / "broken.jsonl", change)
    assert train("--train-file", str(broken)) == 1
    line = said()
    assert line.startswith(f"bilevel-prm train: {broken}:3: field {field}: expected ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_malformed_json_is_named(task, train, said, tmp_path):
    broken = altered(task.data / "train.jsonl", tmp_path / "broken.jsonl", lambda _, row: row)
    lines = broken.read_text().splitlines()
    broken.write_text("\n".join([*lines[:4], lines[4][:-1], *lines[5:]]) + "\n")
    assert train("--train-file", str(broken)) == 1
    line = said()
    assert line.startswith(f"bilevel-prm train: {broken}:5: expected JSON, found ")
    assert line.endswith("; write one complete JSON object per line")


def test_truncated_image_is_found_before_training(task, train, said, tmp_path):
    whole = task.data / read_lines(task.data / "train.jsonl")[0]["images"][0]
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-200])
    broken = altered(
        task.data / "meta.jsonl", tmp_path / "broken.jsonl", breaking("images", [str(cut)])
    )
    assert train("--meta-file", str(broken)) == 1
    line = said()
    assert line.startswith(
        f"bilevel-prm train: {broken}:3: field images[0]: expected a readable image file, found "
    )
    assert str(cut) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--meta-file", "--test-file"])
def test_files_in_the_wrong_place_are_named(task, train, said, option):
    file = task.data / "train.jsonl"
    assert train(option, str(file)) == 1
    line = said()
    assert line.startswith(f"bilevel-prm train: {file}:1: field correct: expected ")
    assert "found nothing; " in line


def test_weights_file_of_other_data_is_named(train, said, tmp_path):
    weights = tmp_path / "weights.jsonl"
    weights.write_text('{"id": "elsewhere-1", "weight": 1.0}\n')
    assert train("--weighting", "none", "--weights-file", str(weights)) == 1
    assert said().startswith(f"bilevel-prm train: {weights}:1: field id: expected ")
    weights.write_text('{"id": "train-0000-0", "weight": 1.0}\n')
    assert train("--weighting", "none", "--weights-file", str(weights)) == 2
    assert "no weight for 17 of 18 training examples" in said()


def test_a_run_is_never_overwritten(train, said, tmp_path):
    def files():
        return {
            path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in (tmp_path / "run").rglob("*")
            if path.is_file()
        }

    assert train() == 0
    before = files()
    assert train("--seed", "5") == 2
    assert "already holds a run, which is complete; nothing was overwritten. Choose" in said()
    assert train("--seed", "5", "--on-existing", "number") == 0
    assert train("--seed", "5", "--on-existing", "number") == 0
    assert files() == before
    first, second, third = (model_bits(tmp_path / name) for name in ("run", "run-2", "run-3"))
    assert second == third != first


def test_other_files_are_not_overwritten_either(train, said, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    assert train() == 2
    assert "is not empty and holds no run; nothing was overwritten" in said()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("weighting", ["net", "table", "none"])
def test_divergence_is_named(train, said, tmp_path, weighting):
    words = ["--weighting", weighting, "--lower-lr", "1e6", "--lower-warmup", "0"]
    assert train(*words) == 1
    line = said()
    assert "step 1: lower_loss is nan. Lower the learning rate" in line
    assert line.endswith(f"go on with: bilevel-prm train --resume {tmp_path / 'run'}")
    assert len(read_lines(tmp_path / "run" / "log.jsonl")) == 1
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_meta_file_without_pairs_is_refused_before_the_run_begins(task, train, said, tmp_path):
    alone = altered(
        task.data / "meta.jsonl",
        tmp_path / "alone.jsonl",
        lambda place, row: row | {"group": str(place)},
    )
    assert train("--meta-file", str(alone), "--loss-target", "pairs") == 1
    line = said()
    assert f"{alone}: expected questions with both a right and a wrong solution" in line
    assert "found none among 12 groups, which have 6 different questions with 12 solutions" in line
    assert not (tmp_path / "run").exists()


def test_interruption_keeps_what_was_logged(train, capsys, monkeypatch, tmp_path):
    def second_line_interrupts(path, line):
        if path.exists():
            raise KeyboardInterrupt
        append_line(path, line)

    monkeypatch.setattr(recipes.train.loop, "append_line", second_line_interrupts)
    assert train() == 130
    assert capsys.readouterr().err.endswith(
        "\nbilevel-prm train: interrupted; what was logged and saved so far is kept\n"
    )
    assert [entry["step"] for entry in read_lines(tmp_path / "run" / "log.jsonl")] == [1]


def test_training_shows_no_bar_without_a_terminal(train, capsys):
    assert train("--progress", "--weighting", "none") == 0
    assert capsys.readouterr().err == ""


def test_a_command_that_saves_nothing_does_not_say_that_it_does(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes.run.provenance, "environment_text", interrupted)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "\nbilevel-prm env: interrupted\n"


def test_a_run_of_the_other_command_is_resumed_by_its_own(train, said, tmp_path):
    assert train("--weighting", "none") == 0
    run = str(tmp_path / "run")
    assert main(["cold-start", "--resume", run]) == 2
    assert said() == (
        f"bilevel-prm cold-start: --resume {run}: is a run of train; "
        f"go on with: bilevel-prm train --resume {run}"
    )
    args = tmp_path / "run" / "args.yaml"
    args.write_text("train_file: t\noutput_dir: o\ndraw: 3\n")
    assert main(["train", "--resume", run]) == 2
    assert said() == (
        f"bilevel-prm train: --resume {run}: is a run of cold-start; "
        f"go on with: bilevel-prm cold-start --resume {run}"
    )


def test_mistakes_of_ours_keep_their_traceback(train, monkeypatch):
    def ours(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(recipes.train.training, "read_train_data", ours)
    with pytest.raises(ZeroDivisionError):
        train()


def test_evaluate_writes_where_it_is_told(task, said, tmp_path):
    words = ["evaluate", "--model", str(task.model), "--file", str(task.data / "test.jsonl")]
    words += ["--system-prompt", "judge each step of the solution"]
    assert main([*words, "--output", str(tmp_path / "new" / "figures.json")]) == 0
    assert json.loads((tmp_path / "new" / "figures.json").read_text())["n_questions"] == 5
    assert main([*words, "--output", str(tmp_path)]) == 2


def test_embedded_data_is_not_overwritten(task, said):
    assert main(["data", "embedded", "--out", str(task.data)]) == 1
    assert said().endswith("exists; remove it or choose another --out")


def test_compare_names_unknown_methods(said, tmp_path):
    words = ["compare", "--methods", "instance_net", "magic", "--work-dir", str(tmp_path / "work")]
    assert main(words) == 2
    assert "--methods: unknown 'magic'; expected among base, cold_start" in said()
    assert not (tmp_path / "work").exists()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    version = metadata.version("bilevel-prm")
    assert capsys.readouterr().out == f"bilevel-prm {version}\n"
    assert recipes.__version__ == version


def test_version_loads_no_torch():
    code = "import sys; from recipes.__main__ import main\ntry: main(['--version'])\nfinally: "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_env_says_what_env_json_says(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    said = {name: value.strip() for name, value in lines.items()}
    found = environment()
    git = found["git"]
    assert said.pop("commit") == (
        "no checkout" if git is None else git["commit"] + ", with changes" * git["dirty"]
    )
    assert said.pop("python") == found["python"] == sys.version.split()[0]
    assert said.pop("platform") == found["platform"]
    assert said.pop("CPUs") == f"{found['cpus']}, {torch.get_num_threads()} threads of torch"
    assert said.pop("devices") == (", ".join(found["devices"]) or "none")
    assert said.pop("CUDA") == (found["cuda"] or "none")
    assert said == found["packages"]
    assert said["torch"] == metadata.version("torch")
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    extras = dict(setup["options.extras_require"])
    users = [
        line for name in extras.keys() - {"test", "dev", "docs"} for line in extras[name].split()
    ]
    assert {line.split(">=")[0] for line in users} < set(said)


def test_env_names_what_is_missing(capsys, monkeypatch):
    def version(name):
        if name in ("peft", "bilevel-prm"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: f"card {n}")
    main(["env"])
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "bilevel-prm not installed as a package",
        "peft not installed",
        "torch 1.0",
        "devices cuda: card 0, cuda: card 1",
    } <= lines


def test_an_abbreviation_of_an_option_with_two_spellings_is_not_ambiguous(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--train-f", "x", "--out"])
    assert "argument --output-dir: expected one argument" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--lower", "3"])
    assert "could match" in capsys.readouterr().err
