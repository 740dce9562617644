"""Row-wise lazy Adam: untouched rows, equality with dense AdamW, with torch.optim.SparseAdam."""

from __future__ import annotations

import pytest
import torch

from bilevel import tree
from bilevel.optimizers.base import Optimizer
from bilevel.optimizers.lazy import LazyRowAdam
from bilevel.optimizers.optimizers import AdamW
from bilevel.optimizers.schedule import WarmupCosine

ROWS = 6


def table() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(ROWS, 3, dtype=torch.float64, generator=generator),
        "raw_weights": torch.randn(ROWS, dtype=torch.float64, generator=generator),
    }


def gradients(step: int, visited: list[int]) -> dict[str, torch.Tensor]:
    """Non-zero in the visited rows only."""
    generator = torch.Generator().manual_seed(step + 1)
    grads = tree.map(torch.zeros_like, table())
    for leaf in grads.values():
        shape = leaf[visited].shape
        leaf[visited] = torch.randn(shape, dtype=torch.float64, generator=generator)
    return grads


def test_with_every_row_visited_it_is_adamw() -> None:
    schedule = WarmupCosine(0.1, 5, 40)
    arguments = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "max_norm": 2.0}
    lazy, dense = LazyRowAdam(schedule, **arguments), AdamW(schedule, **arguments)
    lazy_params, dense_params = table(), table()
    lazy_state, dense_state = lazy.init(lazy_params), dense.init(dense_params)
    for step in range(40):
        grads = gradients(step, list(range(ROWS)))
        lazy_params, lazy_state = lazy.update(grads, lazy_state, lazy_params)
        dense_params, dense_state = dense.update(grads, dense_state, dense_params)
    for name, value in dense_params.items():
        torch.testing.assert_close(lazy_params[name], value, rtol=1e-13, atol=1e-15)
    assert lazy_state.visits["raw_weights"].tolist() == [40] * ROWS
    assert lazy_state.steps.item() == 40


def test_each_row_is_an_adam_of_its_own() -> None:
    """Any visiting order: every row as if it were the only one, stepped when visited."""
    lazy = LazyRowAdam(0.1, weight_decay=0.05)
    dense = AdamW(0.1, weight_decay=0.05)
    visits = [[0], [1, 2], [0, 2], [5], [2, 5, 1], [0]]
    params = table()
    state = lazy.init(params)
    alone = [tree.map(lambda leaf, row=row: leaf[row], params) for row in range(ROWS)]
    states = [dense.init(row) for row in alone]
    for step, visited in enumerate(visits):
        grads = gradients(step, visited)
        params, state = lazy.update(grads, state, params)
        for row in visited:
            row_grads = tree.map(lambda leaf, row=row: leaf[row], grads)
            alone[row], states[row] = dense.update(row_grads, states[row], alone[row])
    for row in range(ROWS):
        for name in params:
            torch.testing.assert_close(params[name][row], alone[row][name], rtol=1e-14, atol=0)
    assert state.visits["raw_weights"].tolist() == [3, 2, 3, 0, 0, 2]


def test_unvisited_rows_and_their_state_stay_bit_for_bit() -> None:
    lazy = LazyRowAdam(0.1, weight_decay=0.1, max_norm=0.1)
    params = table()
    state = lazy.init(params)
    params, state = lazy.update(gradients(0, [0, 1, 2, 3]), state, params)
    before = tree.map(torch.clone, (params, *state[1:]))
    new_params, new_state = lazy.update(gradients(1, [1, 4]), state, params)
    after = (new_params, *new_state[1:])
    for old, unchanged, new in zip(
        tree.leaves(before), tree.leaves((params, *state[1:])), tree.leaves(after), strict=True
    ):
        assert torch.equal(old, unchanged)
        assert torch.equal(old[[0, 2, 3, 5]], new[[0, 2, 3, 5]])
        assert not torch.equal(old[[1, 4]], new[[1, 4]])


def test_its_first_step_is_that_of_sparse_adam() -> None:
    """Later ones differ: SparseAdam counts steps for the whole table.

    It also adds eps before the bias correction; a tiny eps makes that difference vanish.
    """
    weight = torch.nn.Parameter(table()["matrix"].clone())
    grads = gradients(0, [1, 4])["matrix"]
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 4]]), grads[[1, 4]], weight.shape, check_invariants=True
    )
    torch.optim.SparseAdam([weight], lr=0.1, eps=1e-15).step()
    lazy = LazyRowAdam(0.1, eps=1e-15)
    params = table()["matrix"]
    found, _ = lazy.update(grads, lazy.init(params), params)
    torch.testing.assert_close(found, weight.detach(), rtol=1e-11, atol=0)


def test_one_visit_moves_an_entry_by_the_learning_rate() -> None:
    """Dense Adam, long warm, moves it by lr · Σₖ (1−β₁) β₁ᵏ / √((1−β₂) β₂ᵏ) ≈ 32 lr instead."""
    params, gradient = torch.zeros(1, dtype=torch.float64), torch.full((1,), 3.0).double()
    lazy, dense = LazyRowAdam(0.01), AdamW(0.01, eps=1e-12, weight_decay=0.0)
    moved, state = lazy.update(gradient, lazy.init(params), params)
    for _ in range(3):
        moved, state = lazy.update(torch.zeros_like(params), state, moved)
    assert moved.item() == pytest.approx(-0.01, rel=1e-8)

    dense_state = dense.init(params)._replace(steps=torch.tensor(10**6))
    for step in range(400):
        params, dense_state = dense.update(gradient * (step == 0), dense_state, params)
    expected = 0.1 / 0.001**0.5 / (1 - 0.9 / 0.999**0.5)
    assert params.item() == pytest.approx(-0.01 * expected, rel=1e-7)


def test_none_leaves_and_scalars() -> None:
    lazy: Optimizer = LazyRowAdam(0.1)
    params = table()
    grads = {**gradients(0, [2]), "matrix": None}
    new_params, new_state = lazy.update(grads, lazy.init(params), params)
    assert new_params["matrix"] is params["matrix"]
    assert new_state.visits["matrix"].sum().item() == 0
    assert new_state.visits["raw_weights"].sum().item() == 1
    with pytest.raises(ValueError, match=r"'offset' is a scalar; expected shape \[rows, ...\]"):
        lazy.init({"offset": torch.tensor(1.0)})
    assert not hasattr(lazy, "vjp")


def test_float32_tables_stay_float32() -> None:
    lazy = LazyRowAdam(0.1)
    params = tree.map(torch.Tensor.float, table())
    grads = tree.map(torch.Tensor.float, gradients(0, [1]))
    result = lazy.update(grads, lazy.init(params), params)
    assert {leaf.dtype for leaf in tree.leaves(result)} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LazyRowAdam(-1.0), r"LazyRowAdam: lr must lie in \[0, inf\), got -1\.0"),
        (lambda: LazyRowAdam(0.1, betas=(1.0, 0.9)), r"betas\[0\] must lie in \[0, 1\), got 1\.0"),
        (lambda: LazyRowAdam(0.1, eps=0.0), r"eps must lie in \(0, inf\), got 0\.0"),
        (lambda: LazyRowAdam(0.1, weight_decay=-1.0), r"weight_decay .* got -1\.0"),
        (lambda: LazyRowAdam(0.1, max_norm=0.0), r"max_norm must lie in \(0, inf\), got 0\.0"),
    ],
)
def test_errors_name_field_value_and_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
