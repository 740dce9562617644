"""When the graph of a lower pass is kept, and that a product through it is the product."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bilevel import SGD, BilevelProblem, BilevelSolver, OneStep, Reverse, Unrolled
from bilevel.hypergradients import one_graph
from bilevel.lower import second_order
from bilevel.lower.kept_graph import is_small

THETA = {"w": torch.zeros(100, 10)}


def test_a_problem_is_small_up_to_a_number_of_entries() -> None:
    """1,000 of θ and 1,000 of the batch in every step: 2 to the power of 19 hold 262 of them."""
    batch = {"x": torch.zeros(990), "index": (torch.zeros(10, dtype=torch.long),)}
    assert is_small(THETA, [[batch]] * 262)
    assert not is_small(THETA, [[batch]] * 263)
    assert not is_small(THETA, [[batch] * 263])
    assert is_small({"w": torch.zeros(1 << 16)}, [[batch]])
    assert not is_small({"w": torch.zeros((1 << 16) + 1)}, [[batch]])


def test_a_batch_without_a_tensor_says_nothing_of_the_size_of_a_loss() -> None:
    assert not is_small(THETA, [[None]])
    assert not is_small(THETA, [[{"row": 3}]])
    assert is_small(THETA, [[SimpleNamespace(x=torch.zeros(3))]])


def lower_loss(theta, phi, batch):
    return (phi["a"].exp() * (torch.tanh(batch @ theta["w"]) - phi["y"]).square()).mean()


PROBLEM = BilevelProblem(lower_loss, lambda theta, phi, batch: (batch @ theta["w"]).cos().mean())


@pytest.mark.parametrize("steps", [1, 3])
def test_products_through_kept_graphs_need_no_other_pass(steps, monkeypatch) -> None:
    """Forward passes are counted: one per lower step, and one of the upper loss."""
    monkeypatch.setattr(one_graph, "is_small", lambda *_: False)
    torch.manual_seed(0)
    theta = {"w": torch.randn(3, 2, dtype=torch.float64)}
    phi = {"a": torch.randn(2, dtype=torch.float64), "y": torch.randn(5, 2, dtype=torch.float64)}
    batches, upper = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    evaluated = []

    def counted(*arguments):
        evaluated.append(1)
        return lower_loss(*arguments)

    problem = BilevelProblem(counted, PROBLEM.upper_loss)
    method, reference = (
        (OneStep(), OneStep(Reverse())) if steps == 1 else (Unrolled(), Unrolled(product=Reverse()))
    )
    ends = []
    for chosen in (method, reference):
        solver = BilevelSolver(problem, SGD(0.1, 0.9), SGD(1.0), chosen, unroll_steps=steps)
        state, _ = solver.window(solver.init(theta, phi), [[batches]] * steps, upper)
        ends.append(state.upper_params)
    assert len(evaluated) == steps + 2 * steps
    for name, leaf in ends[0].items():
        torch.testing.assert_close(leaf, ends[1][name], rtol=1e-13, atol=1e-14)

    def fails(*arguments):
        raise RuntimeError("no second derivative")

    monkeypatch.setattr(second_order, "derivative_through", fails)
    solver = BilevelSolver(problem, SGD(0.1, 0.9), SGD(1.0), method, unroll_steps=steps)
    evaluated.clear()
    state, _ = solver.window(solver.init(theta, phi), [[batches]] * steps, upper)
    assert len(evaluated) > steps  # a pass of its own for each product
    for name, leaf in state.upper_params.items():
        torch.testing.assert_close(leaf, ends[1][name], rtol=1e-12, atol=1e-13)
