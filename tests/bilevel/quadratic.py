"""The quadratic bilevel problem, whose every hypergradient is known in closed form.

L_lower(w, x) = ½ w'A w + x'C w + a'w        L_upper(w, x) = ½ w'Q w + f'w + ½ x'H x
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from bilevel import BilevelProblem

F64 = torch.float64


class Quadratic:
    """Random coefficients and a point (w, x), float64.

    `spread` is A's condition number, its least eigenvalue 1; `direct` whether H is not 0.
    """

    def __init__(self, *, spread: float = 5.0, direct: bool = True, size=6, upper=4, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        basis = torch.linalg.qr(draw(size, size)).Q
        values = torch.logspace(0.0, torch.tensor(spread).log10().item(), size, dtype=F64)
        self.A = (basis * values) @ basis.T
        factor = draw(size, size) / size**0.5
        self.Q = factor @ factor.T
        self.H = (
            torch.diag(draw(upper).abs() + 0.1) if direct else torch.zeros(upper, upper).to(F64)
        )
        self.C, self.a, self.f = draw(upper, size), draw(size), draw(size)
        self.w, self.x = draw(size), draw(upper)
        self.problem = BilevelProblem(
            lambda w, x, batch: 0.5 * w @ self.A @ w + x @ self.C @ w + self.a @ w,
            lambda w, x, batch: 0.5 * w @ self.Q @ w + self.f @ w + 0.5 * x @ self.H @ x,
        )

    def at(self, w: Tensor) -> Quadratic:
        """The same problem at other lower parameters."""
        other = copy.copy(self)
        other.w = w
        return other

    def gradient(self, w: Tensor) -> Tensor:
        """∇_w L_lower."""
        return self.A @ w + self.C.T @ self.x + self.a

    def step(self, lr: float) -> Tensor:
        """w after a step of gradient descent."""
        return self.w - lr * self.gradient(self.w)

    def solution(self) -> Tensor:
        """w* = −A⁻¹ (C'x + a)."""
        return -torch.linalg.solve(self.A, self.C.T @ self.x + self.a)

    def v(self, w: Tensor) -> Tensor:
        """∇_w L_upper."""
        return self.Q @ w + self.f

    def implicit(self) -> Tensor:
        """H x − C A⁻¹ (Q w* + f), the hypergradient at the lower solution."""
        return self.H @ self.x - self.C @ torch.linalg.solve(self.A, self.v(self.solution()))

    def penalised(self, strength: float) -> Tensor:
        """The minimum y of L_upper + λ L_lower."""
        right = self.f + strength * (self.C.T @ self.x + self.a)
        return -torch.linalg.solve(self.Q + strength * self.A, right)
