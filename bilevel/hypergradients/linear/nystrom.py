"""A solver that forms a matrix of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from bilevel.checks import require
from bilevel.hypergradients.linear.system import LinearSolution, MatVec, System, flat, unflat
from bilevel.tree import Tree


@dataclass(frozen=True)
class Nystrom:
    """The inverse of a low-rank approximation of A, plus damping.

    The solution is::

        A ≈ (A Ω) (Ωᵀ A Ω)⁺ (A Ω)ᵀ = U Λ Uᵀ,    x = U (Λ + δ)⁻¹ Uᵀ b + (b − U Uᵀ b) / δ

    with ``rank`` columns in Ω. For ``rank`` ≥ the rank of a positive semidefinite A this is exactly
    (A + δ I)⁻¹ b; otherwise what A does outside of U is replaced by 0, and the residual says how
    much that was. It is a direct method: ``initial`` does not help and is ignored.

    Hataya and Yamada write the inverse by Woodbury as (1/δ)(b − C (δ W + CᵀC)⁻¹ Cᵀ b) with
    C = A Ω, W = ΩᵀC, whose inner matrix squares the condition number of C; here the eigenvectors
    are orthonormalised first (Tropp et al. 2017, algorithm 3, with a cut in place of the shift),
    which is the same in exact arithmetic and holds in float32. Directions in which W is not
    positive are left out, and a note counts them.

    Args:
        rank: Columns of Ω, at most the number of entries is used.
        damping: δ > 0.
        sketch: "gaussian": Ω an orthonormal basis of random normal columns; "rows": columns of
            the identity, so that A Ω are random columns (rows) of A, the choice of the source:
            cheaper to store, worse where few entries of b matter.
        seed: Of Ω, which is the same in every solve.

    Cost: ``rank`` products and one for the residual; O(entries · rank²) arithmetic. Memory: four
    matrices of entries × rank.
    Source: Hataya and Yamada 2023 (AISTATS, arXiv 2302.09726).

    Raises:
        ValueError: rank < 1, damping ≤ 0, another sketch.
    """

    rank: int = 20
    damping: float = 1e-2
    sketch: Literal["gaussian", "rows"] = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, "rank", self.rank, low=1)
        require(self, "damping", self.damping, low_open=True)
        if self.sketch not in ("gaussian", "rows"):
            raise ValueError(f"Nystrom: sketch must be 'gaussian' or 'rows', got {self.sketch!r}")

    @torch.no_grad()
    def solve(self, matvec: MatVec, rhs: Tree, initial: Tree | None = None) -> LinearSolution:
        """Return x with (A + δ I) x ≈ b; see ``LinearSolver.solve``."""
        system = System(matvec, rhs, self.damping)
        if (done := system.answer_without_solving()) is not None:
            return done
        b = flat(system.rhs)
        basis = self._basis(len(b)).to(b)
        columns = [flat(system.undamped(unflat(column, system.rhs))) for column in basis.T]
        image = torch.stack(columns, dim=1)
        if not torch.isfinite(image).all():
            notes: tuple[str, ...] = ("a product with the sketch is not finite",)
            unknown = unflat(torch.full_like(b, torch.nan), system.rhs)
            return LinearSolution(unknown, torch.nan, 0, system.products, notes)
        vectors, values, negative = _eigenvectors(basis, image)
        along = vectors.T @ b
        rest = b - vectors @ along
        rest = rest - vectors @ (vectors.T @ rest)  # once more: rounding is divided by δ below
        x = vectors @ (along / (values + self.damping)) + rest / self.damping
        notes = ()
        if negative:
            notes = (
                f"{negative} of {basis.shape[1]} sketched directions have negative curvature and "
                "were left out: the matrix is not positive semidefinite",
            )
        return system.finish(unflat(x, system.rhs), basis.shape[1], notes)

    def _basis(self, entries: int) -> Float64[Tensor, "{entries} rank"]:
        """Return Ω with orthonormal columns, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        rank = min(self.rank, entries)
        if self.sketch == "rows":
            chosen = torch.randperm(entries, generator=generator)[:rank]
            basis = torch.zeros(entries, rank, dtype=torch.float64)
            basis[chosen, torch.arange(rank)] = 1.0
            return basis
        normal = torch.randn(entries, rank, dtype=torch.float64, generator=generator)
        orthonormal: Float64[Tensor, "entries rank"] = torch.linalg.qr(normal).Q
        return orthonormal


def _eigenvectors(
    basis: Float[Tensor, "entries rank"], image: Float[Tensor, "entries rank"]
) -> tuple[Float[Tensor, "entries kept"], Float[Tensor, " kept"], int]:
    """Return U, Λ of the Nyström approximation from Ω and A Ω, and the negative directions."""
    core = basis.T @ image
    values, vectors = torch.linalg.eigh((core + core.T) / 2.0)
    noise = values.abs().max() * torch.finfo(image.dtype).eps
    kept = values > noise
    half = image @ (vectors[:, kept] / values[kept].sqrt())
    orthonormal, triangle = torch.linalg.qr(half)
    left, singular, _ = torch.linalg.svd(triangle, full_matrices=False)
    negative = int((values < -10 * len(values) * noise).sum())
    return orthonormal @ left, singular.square(), negative
