"""A process reward model in Python, from loading to best-of-N, on sums in two fallible steps.

    s_k = p("+" after step k)    score = min_k s_k    selected = argmax of 8 candidates' scores

The tiny model that ships with the package has not seen "+" and "-": its first choice is arbitrary.
Look at how often the selected answer is right before and after 30 plain training steps (weights 1).
Run: python examples/best_of_n.py
"""

import random
from importlib.resources import files
from statistics import mean

import torch

import prm


def solve(a: int, b: int, c: int) -> prm.StepExample:
    """A labelled solution, each of whose steps slips with probability 0.3."""
    left = abs(a + b + (random.random() < 0.3) * random.choice([-2, -1, 1, 2]))
    right = abs(left + c + (random.random() < 0.3) * random.choice([-2, -1, 1, 2]))
    first = prm.Step(f"{a} plus {b} = {left}", float(left == a + b))
    second = prm.Step(f"{left} plus {c} = {right}", float(right == left + c))
    text, correct = f"what is {a} plus {b} plus {c} ?", right == a + b + c
    return prm.StepExample("", text, (), (first, second), answer=str(right), correct=correct)


def main() -> dict[str, float]:
    """Select, train, select again; print and return the shares of right answers."""
    random.seed(0)
    judge = prm.load_prm(str(files("recipes") / "assets/base"))
    params = {name: leaf.clone() for name, leaf in prm.split_parameters(judge.model)[0].items()}
    collator = judge.collator(system_prompt="judge each step of the solution")  # words it knows
    numbers = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    random.shuffle(numbers)
    test = [[collator.encode(solve(*three)) for _ in range(8)] for three in numbers[900:]]
    right = [[bool(candidate.example.correct) for candidate in group] for group in test]
    votes = [[candidate.example.answer for candidate in group] for group in test]

    def best_of_8(group: list[prm.EncodedExample], right: list[bool]) -> float:
        scores = prm.score_examples(judge, params, group, collator, batch_size=8)
        return prm.best_of_n([float(steps.min()) for steps in scores], right)

    figures = {"random": mean(map(mean, right)), "untrained": mean(map(best_of_8, test, right))}
    figures["majority"] = mean(map(prm.self_consistency, votes, right))
    optimizer = torch.optim.AdamW([leaf.requires_grad_() for leaf in params.values()], lr=5e-4)
    for start in range(0, 900, 30):
        batch = collator([solve(*three) for three in numbers[start : start + 30]])
        logits = prm.step_logits(judge, params, batch)
        optimizer.zero_grad()
        prm.step_cross_entropy(logits, batch["labels"], batch["step_mask"]).mean().backward()
        optimizer.step()
    figures["trained"] = mean(map(best_of_8, test, right))
    print(*(f"{name:12}{figure:.3f}" for name, figure in figures.items()), sep="\n")
    return figures


if __name__ == "__main__":
    main()
