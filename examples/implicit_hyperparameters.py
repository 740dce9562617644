"""One L2 penalty per feature by implicit differentiation, checked against the closed form.

Ridge regression on 50 rows of 30 features, of which 5 matter, with a penalty exp(λ_j) for each::

    minimise over λ   mean_validation (⟨x_i, w*(λ)⟩ − y_i)²
    w*(λ) = argmin_w mean_train (⟨x_i, w⟩ − y_i)² + Σ_j exp(λ_j) w_j²

Look at how far λ ends from that of autograd through w*(λ) = (XᵀX/50 + diag exp λ)⁻¹ Xᵀy/50, at the
mean λ of both kinds of features, and at the test error beside that of the best single penalty.
Run: python examples/implicit_hyperparameters.py
"""

import torch
from torch import Tensor

from bilevel import SGD, Adam, BilevelProblem, BilevelSolver, ConjugateGradient, Implicit


def main() -> dict[str, float]:
    """Learn the penalties in both ways; print and return how they compare."""
    torch.manual_seed(0)
    x = torch.randn(1100, 30, dtype=torch.float64)
    y = x[:, :5].sum(1) + torch.randn(1100, dtype=torch.float64)
    train, validation, test = zip(x.split([50, 50, 1000]), y.split([50, 50, 1000]), strict=True)

    def error(w: Tensor, penalties: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        return (rows[0] @ w - rows[1]).square().mean()

    def penalised(w: Tensor, penalties: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        return error(w, penalties, rows) + (penalties.exp() * w.square()).sum()

    def exact_error(penalties: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        matrix = train[0].T @ train[0] / 50 + penalties.exp().diag()
        return error(torch.linalg.solve(matrix, train[0].T @ train[1] / 50), penalties, rows)

    problem, implicit = BilevelProblem(penalised, error), Implicit(ConjugateGradient(30))
    solver = BilevelSolver(problem, SGD(0.1, 0.8), Adam(0.1), implicit, unroll_steps=40)
    start = torch.full_like(x[0], -4.0)
    state, _ = solver.window(solver.init(torch.zeros_like(start), start), [[train]] * 500)
    exact = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([exact], 0.1)
    for _ in range(60):  # more would need a smaller step on w: its curvature grows with exp λ
        state, _ = solver.window(state, [[train]] * 40, validation)
        (exact.grad,) = torch.autograd.grad(exact_error(exact, validation), exact)
        optimizer.step()
    grid = [torch.full_like(start, value / 4) for value in range(-32, 9)]
    single = min(grid, key=lambda penalties: float(exact_error(penalties, validation)))
    figures = {
        "largest distance of a λ_j": (state.upper_params - exact.detach()).abs().max(),
        "mean λ, features that matter": state.upper_params[:5].mean(),
        "mean λ, other features": state.upper_params[5:].mean(),
        "test error, best single penalty": exact_error(single, test),
        "test error, learned penalties": error(state.lower_params, state.upper_params, test),
    }
    print(*(f"{name:33}{figure:.3f}" for name, figure in figures.items()), sep="\n")
    return {name: float(figure) for name, figure in figures.items()}


if __name__ == "__main__":
    main()
