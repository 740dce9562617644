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


def completions(chosen, *rated, human=None):
    """A step of PRM800K: its completions with their ratings, and what a person wrote."""

    def one(text, rating):
        return {"text": text, "rating": rating, "flagged": False}

    return {
        "completions": [one(*pair) for pair in rated],
        "human_completion": None if human is None else one(*human) | {"source": "human"},
        "chosen_completion": chosen,
    }


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
        "first_error": 2, "labels": [1, 0, -1],
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
    "math-shepherd": {
        "input": "How many? Step 1: 2 + 3 = 5 ки\nStep 2: 5 - 1 = 3 ки\nStep 3: It is: 3 ки",
        "label": "How many? Step 1: 2 + 3 = 5 +\nStep 2: 5 - 1 = 3 -\nStep 3: It is: 3 -",
        "task": "GSM8K",
    },
    "openrlhf": {
        "text": "How many? Step 1: 5 ки\nStep 2: 4 ки\nStep 3: 3", "value": [1.0, 0.25, 0],
    },
    "openr": {
        "question": "q", "process": "Step 1: a \n\n\n\n\n Step 2: b\n\nc \n\n\n\n\n",
        "label": ["+", "-"],
    },
    "mm-prm": {
        "id": 0, "image": "x.png",
        "conversations": [
            human("<image>\nQuestion: How many?\nProcess: a = 1<prm>\n\nb = 2<prm>"),
            gpt([1.0, 0.125]),
        ],
    },
    "rlhflow": {
        "conversations": [
            {"content": "What is 1 + 1? Step 1: 1 + 1 = 2", "role": "user"},
            {"content": "+", "role": "assistant"},
            {"content": "Step 2: So 3.", "role": "user"}, {"content": "-", "role": "assistant"},
        ],
    },
    "rlhflow-candidates": {
        "prompt": "q",
        "answers": ["a\n\nThe answer is: 1", "Step 1: b ки\nStep 2: The answer is: 2 ки"],
        "label": [1, 0],
    },
    "math-aps": {
        "question": "q", "final_answer": "3",
        "reasoning_steps": [
            {"solution_prefix": "q", "mc_value": 0.75},
            {"solution_prefix": "q\n\na", "mc_value": 0.5},
            {"solution_prefix": "q\n\na\n\nb", "mc_value": 1.0},
            {"solution_prefix": "q\n\na\n\nc", "mc_value": 0.0},
            {"solution_prefix": "q\n\nd", "mc_value": 0.25},
        ],
    },
    "prm800k": {
        "labeler": "x", "timestamp": "2022-07-30T23:23:32.118856", "generation": None,
        "question": {"problem": "1 + 1?", "ground_truth_answer": "2"},
        "label": {
            "steps": [
                completions(0, ("a", 1)),
                completions(None, ("b", -1), ("c", 0), human=("d", None)),
                completions(1, ("e", -1), ("f", 1)),
            ],
            "total_time": 7, "finish_reason": "solution",
        },
    },
    "prmbench": {
        "original_question": "q", "modified_question": "q?", "original_process": ["s", "t"],
        "modified_process": ["s", "u", "v"], "modified_steps": [2, 3], "error_steps": [2],
        "reason": "r", "idx": "p1_0", "question": "q", "classification": "circular",
    },
    "mr-ben": {
        "Question_UUID": "u-1", "Subject": "college_math", "Question": "q",
        "Options": "A: 1 \nB: 2 ",
        "Ground_Truth_Answer": "A", "Sampled_Model": "m",
        "Model_Solution_Steps": ["Step 1: a", "- b", "Step 2: c", "Solution: Choice_B"],
        "Model_Solution_Correctness": "incorrect", "Model_Solution_First_Error_Step": "2",
        "Model_Solution_Error_Reason": ["r"],
    },
    "big-bench-mistake": {
        "input": "q", "steps": ["a", "b", "So the answer is 3"], "answer": "3", "target": "4",
        "mistake_index": 1,
    },
    "mathcheck-checklist": {
        "task_type": "process_judging", "question_type": "seed_question", "group_id": "0",
        "id": "3", "question": "q", "image": "x.png", "answer": "Step 2",
        "solution": "Step 1: a\nStep 2: b\nStep 3: c\n\nThe answer is 3.",
    },
    "math-vision": {
        "id": "1", "model": "m", "response": "a = 1\n\n\\boxed{B}", "model_answer": "b",
        "correct": True, "question": "Which one?\n<image1>", "options": ["one", "two"],
        "image": "x.png",
    },
}  # fmt: skip
