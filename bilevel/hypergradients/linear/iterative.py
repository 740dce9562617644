"""Iterative solvers of (A + δ I) x = b for a symmetric A known only by its products.

Each is a frozen dataclass with a pure ``solve(matvec, rhs, initial)``; see ``LinearSolver``. None
ever fails in silence: the residual is measured by a product, and whatever cut the iteration short
is named in ``LinearSolution.notes``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel import tree
from bilevel.checks import require
from bilevel.hypergradients.linear.system import LinearSolution, MatVec, System
from bilevel.tree import Tree


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradients for positive definite A + δ I.

    One iteration is::

        α = ⟨r, r⟩ / ⟨p, A p⟩    x ← x + α p    r ← r − α A p    p ← r + (⟨r, r⟩' / ⟨r, r⟩) p

    Exact after as many iterations as A has distinct eigenvalues. Where ⟨p, A p⟩ is not positive
    (to rounding: a cosine below the machine epsilon, which for a positive definite matrix means a
    condition number of 4/ε² or more) the iteration stops, says so, and returns the iterate of
    smallest residual so far: A then has no inverse that CG could find. More ``damping`` is the
    remedy.

    Args:
        iterations: At most so many.
        tolerance: Stop when ‖r‖ ≤ tolerance · ‖b‖.
        damping: δ ≥ 0.

    Cost: one product per iteration, one for the residual, one for a warm start. Memory: x, r, p,
    A p and the best iterate, each like b.
    Source: Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016 (arXiv 1602.02355). Betty's
    cg scales the curvature in the step but not in the residual if cg_alpha ≠ 1; hypertorch's (and
    BOAT's) CG returns the iterate before the last; neither has a tolerance on the true residual or
    a curvature guard.

    Raises:
        ValueError: iterations < 1, tolerance or damping negative.
    """

    iterations: int = 20
    tolerance: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        require(self, "iterations", self.iterations, low=1)
        require(self, "tolerance", self.tolerance)
        require(self, "damping", self.damping)

    @torch.no_grad()
    def solve(self, matvec: MatVec, rhs: Tree, initial: Tree | None = None) -> LinearSolution:
        """Return x with (A + δ I) x ≈ b; see ``LinearSolver.solve``."""
        system = System(matvec, rhs, self.damping)
        if (done := system.answer_without_solving()) is not None:
            return done
        x, r, notes = system.start(initial)
        p, square = r, float(tree.vdot(r, r))
        best, best_square = x, square
        iterations = 0
        while iterations < self.iterations and math.sqrt(square) > self.tolerance:
            image = system.product(p)
            curvature = float(tree.vdot(p, image))
            if not math.isfinite(curvature):
                notes += (f"a product is not finite, in iteration {iterations + 1}",)
                x = best
                break
            if curvature <= system.eps * float(tree.norm(p)) * float(tree.norm(image)):
                notes += (
                    f"curvature {curvature / float(tree.vdot(p, p)):.2g} along direction "
                    f"{iterations + 1}: the matrix is not positive definite; use more damping "
                    f"(now {self.damping:g})",
                )
                x = best
                break
            alpha = square / curvature
            r = tree.axpy(-alpha, image, r)
            del image  # not held during what follows
            x = tree.axpy(alpha, p, x)
            iterations += 1
            previous, square = square, float(tree.vdot(r, r))
            if square < best_square:
                best, best_square = x, square
            p = tree.axpy(square / previous, p, r)
        del r, p, best
        solution = system.finish(x, iterations, notes)
        if math.sqrt(square) <= self.tolerance and solution.residual > 10.0 * self.tolerance:
            note = (
                f"rounding: the recurrence reached tolerance {self.tolerance:.1g}, the residual is "
                f"{solution.residual:.2g}; use more damping or higher precision"
            )
            return solution._replace(notes=(*solution.notes, note))
        return solution


@dataclass(frozen=True)
class Neumann:
    """The Neumann series, K + 1 steps of gradient descent on ½⟨x, (A + δ I) x⟩ − ⟨b, x⟩ from 0.

    With the step size η::

        x = η Σ_{k ≤ K} (I − η (A + δ I))^k b

    From a warm start x₀ the same series of b − (A + δ I) x₀ is added to x₀. It converges for
    0 < η < 2 / λ_max of a positive definite matrix. With η the learning rate of plain gradient
    descent at a stationary point, ``Neumann(K − 1, η)`` is the hypergradient through the last K of
    its steps; ``Neumann(0, η)`` is the one-step hypergradient.

    For a symmetric matrix log‖r_k‖ is convex in k: once the residual grows it grows for ever. The
    series is cut there, and a note says so.

    Args:
        iterations: K ≥ 0.
        step_size: η; None: 1 / λ with λ ≤ λ_max the estimate of a power iteration from b.
        tolerance: Stop when ‖r_k‖ ≤ tolerance · ‖b‖; 0: take all terms.
        damping: δ ≥ 0.
        power_iterations: Products for the estimate of λ_max.

    Cost: one product per iteration, one for the residual, one for a warm start,
    ``power_iterations`` if η is not given. Memory: x, r, A r, each like b.
    Source: Lorraine, Vicol and Duvenaud 2020 (arXiv 1911.02590). Betty's neumann has no guard and
    η = 1 as default, which diverges for λ_max > 2.

    Raises:
        ValueError: iterations < 0, step_size ≤ 0, tolerance or damping negative,
            power_iterations < 1.
    """

    iterations: int = 20
    step_size: float | None = None
    tolerance: float = 0.0
    damping: float = 0.0
    power_iterations: int = 10

    def __post_init__(self) -> None:
        require(self, "iterations", self.iterations)
        if self.step_size is not None:
            require(self, "step_size", self.step_size, low_open=True)
        require(self, "tolerance", self.tolerance)
        require(self, "damping", self.damping)
        require(self, "power_iterations", self.power_iterations, low=1)

    @torch.no_grad()
    def solve(self, matvec: MatVec, rhs: Tree, initial: Tree | None = None) -> LinearSolution:
        """Return x with (A + δ I) x ≈ b; see ``LinearSolver.solve``."""
        system = System(matvec, rhs, self.damping)
        if (done := system.answer_without_solving()) is not None:
            return done
        x, r, notes = system.start(initial)
        step, length = self.step_size, float(tree.norm(r))
        if step is None:
            largest = _largest_eigenvalue(system, self.power_iterations)
            if not 0.0 < largest < math.inf:
                notes += (f"the power iteration found λ_max = {largest:g}: no step size",)
                return system.finish(x, 0, notes)
            step = 1.0 / largest
        iterations = 0
        while length > self.tolerance:
            if iterations == self.iterations:
                x = tree.axpy(step, r, x)
                break
            following = tree.axpy(-step, system.product(r), r)
            next_length = float(tree.norm(following))
            if not next_length <= length * GROWTH:
                finite = math.isfinite(next_length)
                why = f"grew from {length:.3g} to {next_length:.3g}" if finite else "is not finite"
                notes += (
                    f"the residual {why} in iteration {iterations + 1}: some eigenvalue lies "
                    f"outside (0, 2 / step_size = {2.0 / step:.3g}); use a smaller step_size or "
                    f"more damping (now {self.damping:g})",
                )
                break
            x, r, length = tree.axpy(step, r, x), following, next_length
            iterations += 1
        return system.finish(x, iterations, notes)


# Growth of a residual per iteration that is put down to rounding.
GROWTH = 1.0 + 1e-6


def _largest_eigenvalue(system: System, iterations: int) -> float:
    """Return a lower bound of |λ|_max: the largest ‖A u‖, u being A^k b of length 1.

    From b, not from noise: eigenvectors without a share in b do not enter the series either.
    """
    u, largest = system.rhs, 0.0
    for _ in range(iterations):
        image = system.product(u)
        length = float(tree.norm(image))
        if not 0.0 < length < math.inf:
            return max(largest, length) if length == 0.0 else length
        largest = max(largest, length)
        u = tree.scale(1.0 / length, image)
    return largest
