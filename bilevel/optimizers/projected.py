"""An optimizer whose parameters stay in a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel.optimizers.base import Optimizer
from bilevel.tree import Tree, TreeT


@dataclass(frozen=True)
class Projected:
    """``φ' = Π(update(φ))``: the steps of another optimizer, each followed by a projection.

    For upper parameters that act through a clamp. Without the projection a parameter that many
    steps pushed past the edge must be pushed back as far before anything changes.

    Args:
        optimizer: Takes the step.
        project: φ -> the nearest φ of the set, of the same structure; idempotent.

    Source: projected gradient descent (Bertsekas 1976); the derivative of ``project`` is not part
    of any hypergradient, so this is for the upper level.
    """

    optimizer: Optimizer
    project: Callable[[Any], Any]

    @property
    def max_norm(self) -> float | None:
        """The optimizer's own clip, if it has one."""
        return getattr(self.optimizer, "max_norm", None)

    def init(self, params: Tree) -> Any:
        """Return the optimizer's state before the first step."""
        return self.optimizer.init(params)

    def update(self, grads: Tree, state: Any, params: TreeT) -> tuple[TreeT, Any]:
        """Return the projected new parameters and the optimizer's new state."""
        new_params, new_state = self.optimizer.update(grads, state, params)
        projected: TreeT = self.project(new_params)
        return projected, new_state
