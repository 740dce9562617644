"""One good record of every data format."""

from __future__ import annotations

SYSTEM = {"from": "system", "value": "Judge."}
JOINT = "<image>\n### Question:\nWhat is x?\n\n### Solution Process:\nx = 4. Then"


def human(text):
    """A turn of the user in a conversation."""
    return {"from": "human", "value": text}


def gpt(sign):
    """The label of a step in a conversation, "+" or "-"."""
    return {"from": "gpt", "value": sign}


GOOD = {
    "prm-jsonl": {
        "id": "a", "question": "q", "images": ["x.png"],
        "steps": [{"text": "s", "label": "+"}, {"text": "t", "label": [3, 8]}, {"text": "u"}],
    },
    "visualprm": {
        "id": 7, "image": "x.png", "dataset": "geo", "source": [1],
        "conversations": [SYSTEM, human(JOINT), gpt("+"), human("so"), gpt("-")],
    },
    "visualprm-raw": {
        "image": "x.png", "question": "<image>\nq", "answer": "4",
        "steps_with_score": [
            {"step": "s ", "score": 0.75, "num_mc_correct": 12, "num_mc_total": 16},
            {"step": "t", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 16},
            {"step": "u", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0},
        ],
    },
    "dreamprm-test": {
        "question": "q", "image_path": "x.png",
        "candidates": ["[Reasoning]\n1. a = 4. b\n2. c\n\nAnswer: B", "A"],
        "true_false": [True, False],
    },
    "dreamprm-train": {
        "id": 3, "sid": 2, "input": "q", "add": "Step 1: a\n\nStep 2: b", "image_path": "x.png",
        "dataset": "chartqa", "score": 7, "times": 11, "accuracy": 0.6363, "ground_truth": "4",
    },
    "dreamprm-meta": {
        "id": 2, "true_false": True, "image_path": "x.png",
        "input": "Question: q\nOptions: (A) 1\n\nStep 1: a\n\nStep 2: b\n\nFinal answer: A",
    },
    "stepwise": {
        "prompt": "q", "completions": ["s", "t", "u", "v"], "labels": [True, False, 0.25, None],
        "images": ["x.png"], "correct": True, "note": 1,
    },
    "messages": {
        "messages": [
            {"role": "system", "content": "Judge."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": JOINT[8:]}]},
            {"role": "assistant", "content": "+"},
        ],
        "images": ["x.png"], "group": "g",
    },
    "processbench": {
        "id": "gsm8k-12", "generator": "m", "problem": "q", "steps": ["s", "t", "u"],
        "final_answer_correct": False, "label": 1,
    },
    "visualprocessbench": {
        "image": ["x.png"], "question": "q", "answer": "4", "policy_model": "m",
        "response": {"steps": ["s", "t", "u"], "process_correctness": [1, -1, 0]},
        "data_source": "MMMU",
    },
    "mathcheck": {
        "id": "geo-0-1", "group": "0", "question": "q", "image": "x.png", "steps": ["s", "t", "u"],
        "first_error": 1, "labels": [1, 0, -1],
    },
    "mathcheck-candidates": {
        "id": "geo-0-6", "question": "q", "image": "x.png", "answer": 145.0,
        "candidates": [{"model": "m", "response": "a\n\nAnswer: 7", "auto_correct": False}],
    },
    "game24": {
        "idx": 900, "puzzle": "4 5 6 10",
        "candidates": [
            {
                "steps": [
                    {"text": "10 - 4 = 6", "kind": "step", "valid": 1, "reach": 0},
                    {"text": "Answer: 6", "kind": "answer", "valid": 0, "reach": 0},
                ],
                "correct": 0,
            }
        ],
    },
}  # fmt: skip
