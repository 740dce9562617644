"""An optimizer whose parameters remain in a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel.optimizers.base import Optimizer
from bilevel.tree import Tree, TreeT


@dataclass(frozen=True)
class Projected:
    """``φ' = Π(update(φ))``: the steps of another optimizer, each followed by a projection.

    It is meant for upper parameters that take effect through a clamp. Without the projection, a
    parameter that many steps moved past the bound must move back as far before it takes effect
    again. No hypergradient includes the derivative of ``project``, so this is for the upper level.
    Source: projected gradient descent (Bertsekas 1976).

    Args:
        optimizer: The optimizer that takes the step.
        project: The idempotent function from φ to the nearest φ of the set, of the same structure.
    """

    optimizer: Optimizer
    project: Callable[[Any], Any]

    @property
    def max_norm(self) -> float | None:
        """The largest gradient norm of the optimizer, or None."""
        return getattr(self.optimizer, "max_norm", None)

    def init(self, params: Tree) -> Any:
        """Return the optimizer's state before the first step."""
        return self.optimizer.init(params)

    def update(self, grads: Tree, state: Any, params: TreeT) -> tuple[TreeT, Any]:
        """Return the projected new parameters and the optimizer's new state."""
        new_params, new_state = self.optimizer.update(grads, state, params)
        projected: TreeT = self.project(new_params)
        return projected, new_state
