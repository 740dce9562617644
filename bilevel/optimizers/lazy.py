"""Adam for tables of which a step uses a few rows: the other rows do not change at all.

Dense Adam keeps moving a row for about 1/(1 − β₁) steps after its last gradient, and its second
moment decays between rare visits. With the defaults, one visit moves an entry of a table with one
row per training example by about 32 × lr in total. Here it moves by about lr, at the visit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_betas, check_eps, require
from bilevel.optimizers.base import clip_scale
from bilevel.optimizers.point import check_shapes
from bilevel.optimizers.rules import adam_direction, add_decay, descend
from bilevel.optimizers.schedule import Schedule
from bilevel.tree import Tree, TreeT


class LazyRowState(NamedTuple):
    """Numbers of steps (int64 scalar) and of visits (int64 [rows]), and moments like the table."""

    steps: Tensor
    visits: Tree
    first_moment: Tree
    second_moment: Tree


@dataclass(frozen=True)
class LazyRowAdam:
    """AdamW that updates, at each step, only the rows (dimension 0) with a non-zero gradient.

    A row at its n-th visit is updated by::

        m' = β₁ m + (1 − β₁) g      s' = β₂ s + (1 − β₂) g²
        θ' = θ − lr ( m'/(1 − β₁ⁿ) / (√(s'/(1 − β₂ⁿ)) + eps) + weight_decay θ )

    All other rows and their moments keep their bits. If every step visits every row, it equals
    ``AdamW``. The rule is that of ``torch.optim.SparseAdam``, with a count per row. The schedule of
    ``lr`` counts the steps of the whole table. There is no ``vjp``, since the upper level needs no
    derivative of its update.

    Momentum lasts for 1/(1 − β₁) visits. If a row has a few tens of visits in a run, its first
    gradients move it for half of the run; with β₁ = 0 every visit has the same influence.

    Raises:
        ValueError: ``lr`` < 0, a beta is outside [0, 1), eps ≤ 0, weight_decay < 0 or max_norm ≤ 0.
    """

    lr: float | Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.lr):
            require(self, "lr", self.lr)
        check_betas(self, self.betas, self.eps)
        require(self, "weight_decay", self.weight_decay)
        if self.max_norm is not None:
            require(self, "max_norm", self.max_norm, low_open=True)

    def init(self, params: Tree) -> LazyRowState:
        """Return the state before the first step.

        Raises:
            ValueError: A leaf is a scalar, which has no rows, or ``eps`` underflows in its
                precision.
        """
        for name, leaf in tree.flatten(params).items():
            if leaf.dim() == 0:
                raise ValueError(f"LazyRowAdam: {name!r} is a scalar; expected shape [rows, ...]")
            check_eps(self, self.eps, self.eps, leaf.dtype, "keep the table in float32")
        return LazyRowState(
            steps=torch.zeros((), dtype=torch.int64, device="cpu"),
            visits=tree.map(lambda leaf: leaf.new_zeros(len(leaf), dtype=torch.int64), params),
            first_moment=tree.zeros_like(params),
            second_moment=tree.zeros_like(params),
        )

    def update(self, grads: Tree, state: LazyRowState, params: TreeT) -> tuple[TreeT, LazyRowState]:
        """Take one step.

        Args:
            grads: Dense gradients like ``params``. Rows of zeros and None leaves are skipped.
            state: The state from ``init`` or the previous ``update``.
            params: The tables, [rows, ...].

        Returns:
            The new tables and the new state. The old ones are not changed.

        Raises:
            ValueError: ``grads`` or ``state`` differ from ``params`` in structure or shape.
        """
        leaves, structure = optree.tree_flatten(params, none_is_leaf=True)
        columns = [structure.flatten_up_to(column) for column in (grads, *state[1:])]
        check_shapes(params, leaves, columns[0], "gradient")
        steps = int(state.steps)
        lr = self.lr(steps) if callable(self.lr) else self.lr
        scale = None
        if self.max_norm is not None:
            scale = clip_scale(tree.norm(grads), self.max_norm)
        new = [
            (p, *rest) if g is None else self._update_rows(p, g, *rest, lr=lr, scale=scale)
            for p, g, *rest in zip(leaves, *columns, strict=True)
        ]
        new_params, *tables = (structure.unflatten(column) for column in zip(*new, strict=True))
        return new_params, LazyRowState(state.steps + 1, *tables)

    def _update_rows(
        self,
        p: Tensor,
        g: Tensor,
        visits: Tensor,
        m: Tensor,
        s: Tensor,
        *,
        lr: float | Tensor,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the new table, visits and moments."""
        index = (g != 0).reshape(len(g), -1).any(dim=1).nonzero().squeeze(1)
        p_rows, g_rows = p[index], g[index].to(p.dtype)
        if scale is not None:
            g_rows = g_rows * scale.to(g_rows.dtype)
        n = visits[index] + 1
        per_row = n.reshape(-1, *[1] * (p.dim() - 1))
        step, m_rows, s_rows = adam_direction(
            g_rows, m[index], s[index], per_row, self.betas, self.eps
        )
        step = add_decay(step, p_rows, self.weight_decay)
        return (
            p.index_copy(0, index, descend(p_rows, step, lr)),
            visits.index_copy(0, index, n),
            m.index_copy(0, index, m_rows),
            s.index_copy(0, index, s_rows),
        )
