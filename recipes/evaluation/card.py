"""The model card of a run: ``model/README.md``, with the front matter that the Hub reads.

It tells what the run recorded, and nothing else: data with rows and digests, weighting, results
with intervals and the command, how the model is asked. What is not recorded is "unknown". There is
no ``model-index`` in the front matter: it names public data sets and tasks of the Hub, and the
files of a run are neither.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prm.models.model import is_hub_name
from recipes.evaluation.table import NAMES, label_of
from recipes.options.flat import flat_options
from recipes.options.parse import command_of
from recipes.options.rules import words_of
from recipes.options.train import ColdStartOptions, TrainOptions
from recipes.terminal import printable

CARD = "README.md"
UNKNOWN = "unknown"

_OWN = ("resume", "progress", "report_to", "on_existing", "threads", "workers", "device")
"""Options that say nothing of how a model was made."""
_LARGEST = 2**20


@dataclass(frozen=True)
class Origin:
    """The model that training began with.

    Attributes:
        name: What the run called it.
        base_model: Its name on the Hub, or that of the model behind it, if known.
        licence: Its licence as its own card names it.
    """

    name: str
    base_model: str | None = None
    licence: str = UNKNOWN


def origin_of(args: Mapping[str, Any]) -> Origin:
    """Return where a model comes from, by the options of its run and its first model's card."""
    start = str(args.get("init_from") or args["model"])
    if start == "embedded":
        return Origin("the tiny InternVL that ships with bilevel-prm", None, "apache-2.0")
    front = _front_matter(Path(start) / CARD)
    own = front.get("library_name") == "transformers" and "base_license" in front
    base = front.get("base_model") if own else start if is_hub_name(start) else None
    licence = front.get("base_license" if own else "license")
    return Origin(
        f"`{_plain(_short(start))}`",
        base if isinstance(base, str) else None,
        licence if isinstance(licence, str) else UNKNOWN,
    )


def _front_matter(path: Path) -> Mapping[str, Any]:
    """Return the front matter of a card; nothing of one that is absent or has none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST)
        parts = text.split("---\n", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def model_card(
    name: str,
    args: Mapping[str, Any],
    environment: Mapping[str, Any],
    results: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the card.

    Args:
        name: The name of the run.
        args: The options of the run, as its ``args.yaml`` has them.
        environment: Its ``env.json``: versions, and fingerprints of the data files.
        results: Its ``results.json``.
        files: ``config.json`` and ``prm.json`` of the model, by name.
    """
    origin = origin_of(args)
    sees = "vision_config" in files["config.json"]
    weighting = str(args.get("weighting", "none"))
    tags = ["process-reward-model", "reward-model", "bilevel-prm"]
    front: dict[str, Any] = {"license": UNKNOWN}
    if origin.base_model is not None:
        front["base_model"] = origin.base_model
    front["base_license"] = origin.licence
    front["pipeline_tag"] = "image-text-to-text" if sees else "text-generation"
    front["library_name"] = "transformers"
    learns = {"none": [], "labels": ["learned-labels"]}
    front["tags"] = tags + learns.get(weighting, ["instance-reweighting"])
    version = environment.get("packages", {}).get("bilevel-prm", UNKNOWN)
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip("\n"),
        "---",
        "",
        f"# {_plain(name)}",
        "",
        f"A process reward model{' that sees images' if sees else ''}: it gives every step of a "
        f"solution the probability that it is right. Trained by bilevel-prm {_plain(version)}.",
        "",
        *_use(),
        "## Results",
        "",
        *_results(results, args),
        "## Training",
        "",
        f"- First model: {origin.name}",
        *_training(args, results),
        "",
        *_data(environment.get("data", {})),
        "The command, with every option that is not at its default (of absolute paths their ends):",
        "",
        "```sh",
        _command(args),
        "```",
        "",
        "## How it is asked",
        "",
        "A model that is asked otherwise than it was trained gives other scores. `prm.json` says "
        "how, and `prm.Scorer` and the commands read it: after the system turn one turn of the "
        "user for every step, each followed by one of the assistant that holds the label alone; "
        'the score of a step is p("+") at the token before it.',
        "",
        "```json",
        json.dumps(files["prm.json"], indent=1, ensure_ascii=False),
        "```",
        "",
        "## Limits",
        "",
        *_limits(results),
        "",
        "## Licence",
        "",
        f"- First model: {_plain(origin.licence)}",
        "- Training data: unknown; the run records files, not their terms",
        "- This model: unknown until its owner says so; `license` above is where the Hub reads it",
    ]
    return "\n".join(lines) + "\n"


def _use() -> Sequence[str]:
    return (
        "```python",
        "from prm import Scorer",
        "",
        'scorer = Scorer.from_pretrained("folder or name of this model")',
        'step_scores = scorer.score(["What is 3 + 4?"], ["3 + 4 = 7\\n\\nAnswer: 7"])',
        "```",
        "",
        "The folder also loads with plain transformers (`AutoModelForImageTextToText` or "
        "`AutoModelForCausalLM`, and `AutoTokenizer`).",
        "",
    )


def _results(results: Mapping[str, Any], args: Mapping[str, Any]) -> Iterator[str]:
    parts = [("test", results), ("dev", results.get("dev") or {})]
    parts = [(file, part) for file, part in parts if part.get("rows")]
    if not parts:
        yield "The run evaluated nothing: `bilevel-prm evaluate` does."
        yield ""
    for file, part in parts:
        path = _plain(_short(str(args.get(f"{file}_file"))))
        chosen = ", on which the model was chosen" if file == "dev" and _is_chosen(results) else ""
        yield f"Best-of-N accuracy on {part['n_questions']} questions of `{path}` ({file}{chosen}):"
        yield ""
        yield "| selector | accuracy | 95 % interval |"
        yield "|---|---|---|"
        order = [name for name in NAMES if name in part["rows"]]
        for name in [*order, *(name for name in part["rows"] if name not in NAMES)]:
            interval = part.get("ci95", {}).get(name)
            told = "unknown" if interval is None else "[{:.3f}, {:.3f}]".format(*interval)
            yield f"| {label_of(name)} | {part['rows'][name]:.3f} | {told} |"
        yield ""
        if part.get("step_auc") is not None:
            yield (
                f"Steps against their labels: AUC {part['step_auc']:.3f}, macro F1 "
                f"{part['step_macro_f1']:.3f}."
            )
            yield ""
    if parts:
        files = " or ".join(f"`{_plain(_short(str(args[f'{f}_file'])))}`" for f, _ in parts)
        yield (
            "Intervals are by bootstrap over questions. Again: `bilevel-prm evaluate --model "
            f"MODEL --file FILE`, FILE being {files}."
        )
        yield ""


def _training(args: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    steps, batch = args["steps"], args["batch_size"] * args["accumulation"]
    yield f"- {steps} steps of {batch} examples, seed {args['seed']}"
    if "weighting" not in args:
        yield f"- A cold start on {results['examples']} examples drawn from the file, all weights 1"
        return
    kinds = {"net": "Instance Net", "table": "Instance Table", "domain": "Domain Table"}
    given = "given in a file" if args.get("weights_file") else "all 1 (No Selection)"
    learned = kinds.get(args["weighting"])
    measure = "weight"
    if (labels := results.get("labels")) is not None:
        measure = "agreement"
        turned = f"{labels['turned_over']:,} of {labels['steps']:,} were turned over"
        yield f"- Labels of the steps: learned, {turned}; agreement is 1 minus how far they moved"
    else:
        yield f"- Weights of the examples: {f'learned ({learned})' if learned else given}"
    for source, entry in results.get("sources", {}).items():
        yield f"  - mean {measure} of `{_plain(source)}`: {entry['mean_weight']:.2f}"
    if results.get("weight_auc") is not None:
        yield f"  - AUC of the {measure}s, right against wrong labels: {results['weight_auc']:.3f}"
    if _is_chosen(results):
        yield f"- The model is that of step {results['model_selection']['step']}, chosen on dev"


def _is_chosen(results: Mapping[str, Any]) -> bool:
    chosen = results.get("model_selection")
    return chosen is not None and chosen["step"] != chosen["last"]["step"]


def _data(data: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| data | file | rows | bytes | SHA-256 |"
    yield "|---|---|---|---|---|"
    for option, found in data.items():
        role = option.removesuffix("_file").replace("_", " ")
        yield (
            f"| {role} | `{_plain(_short(found['path']))}` | {found['lines']:,} | "
            f"{found['bytes']:,} | `{found.get('sha256', UNKNOWN)}` |"
        )
    yield ""


def _command(args: Mapping[str, Any]) -> str:
    """Return the command of a run, without folders of the machine."""
    command = command_of(args)
    entries = flat_options(TrainOptions if command == "train" else ColdStartOptions)
    words = []
    for name, entry in entries.items():
        value = args.get(name, entry.default)
        value = tuple(value) if isinstance(value, list) else value
        if name not in _OWN and value != entry.default:
            is_path = entry.path or name == "output_dir"
            words += words_of(name, _short(str(value)) if is_path and value is not None else value)
    return printable(shlex.join(["bilevel-prm", command, *words]))


def _limits(results: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "- A score is the model's opinion of a step, learned from labels of mixed quality, and no "
        "proof. Results are of the files above; other questions were not tried."
    )
    if results.get("sanity_check"):
        yield (
            "- SANITY CHECK: questions of the test set are in the meta set, or in the dev set that "
            "chose the model, so that its results are an upper bound and no estimate."
        )
    for text in results.get("signs", {}).values():
        yield f"- {_plain(text)}"
    for kind, count in results.get("troubles", {}).items():
        yield f"- Numerical trouble in training: {_plain(kind.replace('_', ' '))}, {count} times"


def _short(path: str) -> str:
    """Return a path without what an absolute one tells of the machine: its last two parts."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _plain(text: object) -> str:
    """Return text of a user that means nothing in Markdown: one line, without marks."""
    marks = str.maketrans({"|": "/", "`": "'", "<": "(", ">": ")"})
    return " ".join(printable(str(text)).translate(marks).split())
