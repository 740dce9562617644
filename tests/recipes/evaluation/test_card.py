"""The model card: what the Hub reads of it, facts of the run, nothing invented."""

from __future__ import annotations

import json
import shlex

import pytest
from huggingface_hub import ModelCard

from recipes.evaluation.card import CARD, model_card, origin_of
from recipes.options.flat import flatten
from recipes.options.parse import cold_start_options, train_options

PRM = {"format": 1, "system_prompt": "judge\n```\n| each |", "threshold": 0.625}
FILES = {"config.json": {"vision_config": {}}, "prm.json": PRM}
DATA = {
    "train_file": {"path": "/home/me/secret/data/train.jsonl", "bytes": 1234, "lines": 2000}
    | {"sha256": "a" * 64},
    "test_file": {"path": "data/te|st`.jsonl", "bytes": 5, "lines": 1},
}
LABELS = {"steps": 3200, "turned_over": 1029}
RESULTS = {
    "rows": {"instance_net": 0.75, "pass@1": 0.5},
    "ci95": {"instance_net": [0.7, 0.8], "pass@1": [0.4, 0.6]},
    "n_questions": 40,
    "step_auc": 0.9,
    "step_macro_f1": 0.8,
    "dev": {"rows": {"instance_net": 0.5}, "ci95": {}, "n_questions": 7, "step_auc": None},
    "sources": {"<b>crowd": {"mean_weight": 1.5}},
    "weight_auc": 0.875,
    "model_selection": {"step": 3, "last": {"step": 4}},
    "troubles": {"weights_at_bound": 2},
    "signs": {"upper_loss_did_not_fall": "the upper loss did not fall"},
}


def options(**more):
    given = {"train_file": "/home/me/secret/data/train.jsonl", "output_dir": "runs/net"}
    given |= {"meta_file": "meta.jsonl", "test_file": "data/te|st`.jsonl", "dev_file": "dev.jsonl"}
    return json.loads(json.dumps(flatten(train_options(**{**given, "batch_size": 4, **more}))))


def card(args=None, results=None, files=FILES) -> str:
    environment = {"packages": {"bilevel-prm": "0.1.0"}, "data": DATA}
    return model_card("net", args or options(), environment, results or RESULTS, files)


def test_the_hub_reads_the_front_matter():
    data = ModelCard(card(options(model="org/base"))).data
    assert (data.license, data.base_model) == ("unknown", "org/base")
    assert (data.pipeline_tag, data.library_name) == ("image-text-to-text", "transformers")
    reward = ["process-reward-model", "reward-model"]
    assert data.tags == [*reward, "bilevel-prm", "instance-reweighting"]
    assert data.eval_results is None
    text = ModelCard(card(files={**FILES, "config.json": {}})).data
    assert (text.pipeline_tag, text.base_model) == ("text-generation", None)


def test_the_facts_are_those_of_the_run():
    text = card()
    for line in (
        "Best-of-N accuracy on 40 questions of `data/te/st'.jsonl` (test):",
        "| PRM: Instance Net | 0.750 | [0.700, 0.800] |",
        "| pass@1 (random candidate) | 0.500 | [0.400, 0.600] |",
        "Steps against their labels: AUC 0.900, macro F1 0.800.",
        "Best-of-N accuracy on 7 questions of `dev.jsonl` (dev, on which the model was chosen):",
        "| PRM: Instance Net | 0.500 | unknown |",
        "| train | `data/train.jsonl` | 2,000 | 1,234 | `" + "a" * 64 + "` |",
        "| test | `data/te/st'.jsonl` | 1 | 5 | `unknown` |",
        "- 300 steps of 4 examples, seed 0",
        "- Weights of the examples: learned (Instance Net)",
        "  - mean weight of `(b)crowd`: 1.50",
        "  - AUC of the weights, right against wrong labels: 0.875",
        "- The model is that of step 3, chosen on dev",
        "- the upper loss did not fall",
        "- Numerical trouble in training: weights at bound, 2 times",
        "- First model: the tiny InternVL that ships with bilevel-prm",
        "- First model: apache-2.0",
        "- Training data: unknown; the run records files, not their terms",
    ):
        assert line in text.splitlines(), line
    assert "secret" not in text
    assert "SANITY CHECK" not in text
    assert "SANITY CHECK: questions of the test set are in the meta set" in card(
        results=RESULTS | {"sanity_check": True}
    )


def test_learned_labels_are_no_weights():
    text = card(options(weighting="labels"), RESULTS | {"labels": LABELS})
    for line in (
        "- Labels of the steps: learned, 1,029 of 3,200 were turned over; agreement is 1 minus how "
        "far they moved",
        "  - mean agreement of `(b)crowd`: 1.50",
        "  - AUC of the agreements, right against wrong labels: 0.875",
    ):
        assert line in text.splitlines(), line
    assert "eights of the examples" not in text
    assert "learned-labels" in ModelCard(text).data.tags
    assert "instance-reweighting" not in text


def test_the_command_is_the_one_that_was_given():
    args = options(freeze=("vision_tower",), weighting="table", initial_loss=False, threads=3)
    command = card(args).split("```sh\n")[1].split("\n")[0]
    assert shlex.split(command) == [
        *("bilevel-prm", "train", "--train-file", "data/train.jsonl", "--output-dir", "runs/net"),
        *("--freeze", "vision_tower", "--batch-size", "4", "--no-initial-loss"),
        *("--meta-file", "meta.jsonl", "--dev-file", "dev.jsonl"),
        *("--test-file", "data/te|st`.jsonl", "--weighting", "table"),
    ]


def test_how_it_is_asked_is_the_file_itself():
    text = card().split("```json\n")[1].split("\n```\n")[0]
    assert json.loads(text) == PRM


def test_a_cold_start_has_a_card_without_results():
    given = cold_start_options(train_file="t.jsonl", output_dir="cold")
    args = json.loads(json.dumps(flatten(given)))
    results = {"rows": {}, "examples": 300, "troubles": {}}
    text = card(args, results)
    assert "The run evaluated nothing: `bilevel-prm evaluate` does." in text
    assert "- A cold start on 300 examples drawn from the file, all weights 1" in text
    assert "instance-reweighting" not in text


@pytest.mark.parametrize(
    ("front", "base", "licence"),
    [
        (
            "base_license: mit\nbase_model: org/base\nlibrary_name: transformers\n",
            "org/base",
            "mit",
        ),
        ("license: apache-2.0\nbase_model: other/older\n", None, "apache-2.0"),
        ("license: [mit]\n", None, "unknown"),
        (": {", None, "unknown"),
        ("- a\n", None, "unknown"),
    ],
)
def test_a_first_model_is_what_its_own_card_says(tmp_path, front, base, licence):
    (tmp_path / CARD).write_text(f"---\n{front}---\n# A model\n")
    origin = origin_of({"model": "embedded", "init_from": str(tmp_path)})
    assert (origin.base_model, origin.licence) == (base, licence)


def test_what_is_not_known_of_a_first_model_is_not_invented(tmp_path):
    origin = origin_of({"model": str(tmp_path / "base")})
    assert (origin.base_model, origin.licence) == (None, "unknown")
    assert origin.name == f"`{tmp_path.name}/base`"
    origin = origin_of({"model": "org/base"})
    assert (origin.base_model, origin.licence) == ("org/base", "unknown")
