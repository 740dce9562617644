"""A solver that forms the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.checks import require
from bilevel.hypergradients.linear.system import LinearSolution, MatVec, System, flat, unflat
from bilevel.tree import Tree


@dataclass(frozen=True)
class Dense:
    """The whole matrix, column by column, and its eigenvalues: for tests and tiny problems.

    Directions whose eigenvalue is 0 to rounding are left out (x is the solution of least norm);
    they and negative eigenvalues are noted. ``initial`` is ignored.

    Args:
        damping: δ ≥ 0.
        entries_limit: Refuse systems with more entries.

    Cost: as many products as b has entries, and one; O(entries³) arithmetic, entries² memory.

    Raises:
        ValueError: damping negative; in ``solve``: too many entries.
    """

    damping: float = 0.0
    entries_limit: int = 2048

    def __post_init__(self) -> None:
        require(self, "damping", self.damping)
        require(self, "entries_limit", self.entries_limit, low=1)

    @torch.no_grad()
    def solve(self, matvec: MatVec, rhs: Tree, initial: Tree | None = None) -> LinearSolution:
        """Return x with (A + δ I) x ≈ b; see ``LinearSolver.solve``."""
        system = System(matvec, rhs, self.damping)
        if (done := system.answer_without_solving()) is not None:
            return done
        b = flat(system.rhs)
        if len(b) > self.entries_limit:
            raise ValueError(
                f"Dense: expected at most entries_limit={self.entries_limit} entries, found "
                f"{len(b)}; choose ConjugateGradient(), Neumann() or Nystrom()"
            )
        identity = torch.eye(len(b), dtype=b.dtype, device=b.device)
        columns = [flat(system.product(unflat(column, system.rhs))) for column in identity]
        matrix = torch.stack(columns)
        if not torch.isfinite(matrix).all():
            unknown = unflat(torch.full_like(b, torch.nan), system.rhs)
            notes: tuple[str, ...] = ("the matrix is not finite",)
            return LinearSolution(unknown, torch.nan, 0, system.products, notes)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2.0)
        cut = values.abs().max() * system.eps * len(b)
        kept = values.abs() > cut
        notes = ()
        if not kept.all():
            notes += (f"{int((~kept).sum())} of {len(b)} eigenvalues are 0 and were left out",)
        if (values < -cut).any():
            notes += (f"{int((values < -cut).sum())} of {len(b)} eigenvalues are negative",)
        x = vectors[:, kept] @ ((vectors[:, kept].T @ b) / values[kept])
        return system.finish(unflat(x, system.rhs), len(b), notes)
