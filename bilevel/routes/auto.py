"""The route that chooses among the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.micro_batch import MicroBatch, PassContext
from bilevel.lower.route import BackwardPass, DerivativeRequest, Product, Route
from bilevel.problem import Params, Problem, ReweightingProblem
from bilevel.routes.base import PlainBackward
from bilevel.routes.jvp import Jvp
from bilevel.routes.reverse import Reverse
from bilevel.routes.tapped import tapped_backward
from bilevel.tree import Tree

T = TypeVar("T")

# Where the rules per example do not apply: exact for every problem, the cheaper one first.
CHAIN: tuple[Route, ...] = (Jvp(), Reverse())


@dataclass(frozen=True)
class Auto(PlainBackward):
    """The cheapest exact route that applies, decided micro-batch by micro-batch.

    For a ``ReweightingProblem`` with detached features: ``Dot`` for single examples, else ``Ghost``
    (order upper-first) or ``PerExample`` (lower-first), if there is a rule for each use that the
    model makes of a parameter and the weighted gradient is autograd's own. An operation that joins
    rows of the batch is known (``bilevel.lower.ghost.mixing``), the rest is measured, on the first
    step and for new shapes (``bilevel.lower.ghost.verification``). Otherwise, and for every other
    problem, ``Jvp`` or, if a torch operation has no forward-mode derivative, ``Reverse``;
    ``StepInfo.notes`` says which and why. ``Reverse`` at once where derivatives of the gradient in
    θ and in φ are wanted together: both take as long there, and ``Jvp`` (forward over reverse)
    takes more memory, and on small problems, whose lower pass keeps its graph for it
    (``bilevel.lower.kept_graph``).
    """

    def backward_pass(self, context: PassContext, total: GradientSum) -> BackwardPass:
        """Return the backward pass under taps; a plain one where these have no rule."""
        return partial(tapped_backward, context)

    def loss_slopes(
        self,
        problem: ReweightingProblem[Any, Any, Any],
        micro: MicroBatch,
        lower_params: Params,
        direction: Tree,
    ) -> Float[Tensor, " batch"] | None:
        """Return ``⟨μ, ∇ℓ_i⟩ / size``, [size], by the first route of the chain that applies."""
        return _first(
            micro, lambda route: route.loss_slopes(problem, micro, lower_params, direction)
        )

    def gradient_derivative(self, request: DerivativeRequest) -> Sequence[Tensor | None]:
        """Return the derivative of the wanted gradients: of both by double backward."""
        chain = CHAIN[::-1] if request.lower and request.upper else CHAIN
        return _first(request.micro, lambda route: route.gradient_derivative(request), chain)

    def hessian_product(
        self, problem: Problem, micro: MicroBatch, lower_params: Params, upper_params: Params
    ) -> Product:
        """Return v -> ∇²_θθ L v by the first route of the chain that applies."""
        products: dict[Route, Product] = {}

        def by(route: Route, vector: Tree) -> Tree:
            if route not in products:
                products[route] = route.hessian_product(problem, micro, lower_params, upper_params)
            return products[route](vector)

        return lambda vector: _first(micro, lambda route: by(route, vector))


def _first(micro: MicroBatch, ask: Callable[[Route], T], chain: Sequence[Route] = CHAIN) -> T:
    """Return what the first route that applies to the micro-batch answers.

    The lower pass has computed these very losses, so whatever a route fails with is its own: an
    operation without the derivative that it needs, or one that looks into the memory of a tensor.

    Raises:
        RuntimeError: None applies. The message has the reason of each.
    """
    reasons = micro.fallback.reasons
    for route in chain:
        if str(route) in reasons:
            continue
        try:
            answer = ask(route)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reasons[str(route)] = f"{route} fails ({_first_sentence(error)})"
            continue
        if any(str(earlier) in reasons for earlier in chain):
            micro.fallback.taken = str(route)
        return answer
    raise RuntimeError(
        f"no exact derivative of the lower loss: {'; '.join(reasons.values())}; replace the "
        "operation, or choose the route CentralDifference()"
    )


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of torch's own message."""
    cause = error.__cause__ or error
    sentence = str(cause).partition("\n")[0].partition(". ")[0].removesuffix(".")
    return f"{type(cause).__name__}: {sentence}"
