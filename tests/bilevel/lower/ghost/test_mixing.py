"""Operations that join rows are told by themselves, also where this batch has nothing to join."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bilevel import Auto, OneStep, PerExample, Refusal, ReweightingProblem
from tests.bilevel.by_hand import cubes, step_by_hand, step_of_solver
from tests.bilevel.comparing import relative

BATCH, SIZE = 4, 3
UPPER = {"raw": torch.tensor([-1.0, 0.2, 0.9, 2.0], dtype=torch.float64)}
WEIGHT = {"w": torch.linspace(-1.0, 1.0, SIZE * 5, dtype=torch.float64).reshape(SIZE, 5)}
ALL = torch.arange(BATCH)


def batch_of(used):
    """A batch whose mixed terms count (``used`` 1) or not (0), of which the first step tells."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, SIZE, dtype=torch.float64, generator=generator)
    return {"x": x, "used": torch.full((BATCH,), used, dtype=torch.float64)}


# Functions of features z [4, 5] that depend on other rows, as numbers per example or one for all.
JOINED = {
    "mean": lambda z: (z - z.mean(0)).square().sum(1),
    "mean of all": lambda z: z.mean(),
    "sum by name": lambda z: z.sum(dim=0).square().sum(),
    "sum over a negative dimension": lambda z: z.sum(-2).square().sum(),
    "variance": lambda z: torch.var(z, 0).sum(),
    "normalised over the batch": lambda z: functional.normalize(z, dim=0).sum(1),
    "softmax over the batch": lambda z: z.softmax(0)[:, 0],
    "cumulated": lambda z: z.cumsum(0)[:, 0],
    "largest": lambda z: z[:, 0].max(),
    "norm of everything": lambda z: torch.linalg.vector_norm(z),
    "mean loss": lambda z: functional.mse_loss(z, torch.zeros_like(z)),
    "pairs by a new axis": lambda z: (z[:, None] - z[None]).square().sum((1, 2)),
    "pairs by unsqueeze": lambda z: (z.unsqueeze(1) - z.unsqueeze(0)).square().sum((1, 2)),
    "similarities": lambda z: (z @ z.T).square().sum(1),
    "similarities by einsum": lambda z: torch.einsum("id,jd->ij", z, z).square().sum(1),
    "neighbours": lambda z: (torch.ones(BATCH, BATCH, dtype=z.dtype) @ z).sum(1),
    "covariance": lambda z: (z.T @ torch.ones(BATCH, dtype=z.dtype)).square().sum(),
    "groups": lambda z: torch.zeros_like(z).index_add(0, ALL * 0, z).sum(1),
    "scattered": lambda z: torch.zeros_like(z).scatter_add(0, (ALL * 0)[:, None].expand(-1, 5), z)[
        :, 0
    ],
    "batch statistics": lambda z: functional.batch_norm(z, None, None, training=True)[:, 0],
}

# The same kind of functions row by row.
APART = {
    "mean of each": lambda z: (z - z.mean(1, keepdim=True)).square().sum(1),
    "softmax of each": lambda z: z.softmax(-1)[:, 0],
    "largest of each": lambda z: z.max(1).values,
    "larger of two": lambda z: torch.max(z, z.detach() + 0.1).sum(1),
    "normalised": lambda z: functional.normalize(z)[:, 0],
    "norm of each": lambda z: torch.linalg.vector_norm(z, dim=1),
    "losses of each": lambda z: functional.mse_loss(z, z.new_zeros(z.shape), reduction="none").sum(
        1
    ),
    "products of each": lambda z: (z[:, None] @ z[:, :, None]).flatten(),
    "by einsum": lambda z: torch.einsum("id,id->i", z, z),
    "a new axis inside": lambda z: (z[:, None] - z[:, :, None]).square().sum((1, 2)),
    "mean without a graph": lambda z: (z - z.detach().mean(0)).square().sum(1),
    "a frozen layer": lambda z: (z @ torch.ones(5, 2, dtype=z.dtype)).sum(1),
    "one row at a time": lambda z: torch.stack([row.square().sum() for row in z]),
    "one entry at a time": lambda z: torch.stack([z[i, 0].exp() for i in range(BATCH)]),
    "statistics of a run": lambda z: functional.batch_norm(
        z, torch.zeros(5, dtype=z.dtype), torch.ones(5, dtype=z.dtype)
    )[:, 0],
}


def problem_of(term) -> ReweightingProblem:
    def losses(lower, batch):
        z = torch.tanh(batch["x"] @ lower["w"])
        return z.square().sum(1) + batch["used"] * term(z), None

    return ReweightingProblem(losses, lambda upper, *_: torch.sigmoid(upper["raw"]), cubes)


@pytest.mark.parametrize("name", JOINED)
def test_rows_that_are_joined_later_are_told_at_once(name):
    problem = problem_of(JOINED[name])
    for used in (0.0, 1.0):
        batch = batch_of(used)
        with pytest.raises(Refusal, match=r"examples may influence each other: .* joins the rows"):
            step_of_solver(problem, OneStep(PerExample()), WEIGHT, UPPER, [batch], batch)
        expected = step_by_hand(problem.lower_loss, WEIGHT, UPPER, batch)
        found = step_of_solver(problem, OneStep(Auto()), WEIGHT, UPPER, [batch], batch)
        assert relative(found[0], expected[0]) <= 1e-14
        assert relative(found[1], expected[1]) <= 1e-10


@pytest.mark.parametrize("name", APART)
def test_what_goes_row_by_row_keeps_its_rules(name):
    problem, batch = problem_of(APART[name]), batch_of(1.0)
    expected = step_by_hand(problem.lower_loss, WEIGHT, UPPER, batch)
    found = step_of_solver(problem, OneStep(PerExample()), WEIGHT, UPPER, [batch], batch)
    assert relative(found[0], expected[0]) <= 1e-12
    assert relative(found[1], expected[1]) <= 1e-10


def test_losses_in_another_order_are_told_where_this_batch_keeps_its_own():
    problem = ReweightingProblem(
        lambda lower, batch: ((batch["x"] @ lower["w"]).square().sum(1)[batch["order"]], None),
        lambda upper, *_: torch.sigmoid(upper["raw"]),
        cubes,
    )
    for order, told in ((ALL, False), (ALL.roll(1), True)):
        batch = batch_of(0.0) | {"order": order}
        found = step_of_solver(problem, OneStep(), WEIGHT, UPPER, [batch], batch)
        expected = step_by_hand(problem.lower_loss, WEIGHT, UPPER, batch)
        assert relative(found[0], expected[0]) <= 1e-14
        assert relative(found[1], expected[1]) <= 1e-10
        assert any("in another order" in note for note in found[2]) == told
