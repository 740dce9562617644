"""Learn which labels to trust, with an `nn.Module` and a `DataLoader`.

Half of the labels of 1200 handwritten digits are wrong; 100 further labels are known to be right.
ℓ_i is the cross-entropy of a network θ on row i, w_i(φ) its weight, a table's entry in [0, 2]::

    minimise over φ   mean_clean ℓ(θ*(φ))   with θ*(φ) reached by steps on   mean_i w_i(φ) ℓ_i(θ)

Look at the mean weights of both kinds of labels, and at test accuracies after as many steps.
Run: python examples/noisy_labels.py   (scikit-learn holds the digits)
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bilevel import AdamW, BilevelSolver, LazyRowAdam, ReweightingProblem, functional
from weighting import InstanceTable


def main() -> dict[str, float]:
    """Train three times; print and return test accuracies and mean weights."""
    torch.manual_seed(0)
    x, truth = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x, (clean, train, test) = x.float() / 16, torch.randperm(1797).split([100, 1200, 497])
    wrong = torch.rand(1200) < 0.5
    labels = (truth[train] + wrong * torch.randint(1, 10, (1200,))) % 10
    noisy = DataLoader(TensorDataset(x[train], labels, torch.arange(1200)), 100, shuffle=True)
    trusted = [x[clean], truth[clean], torch.arange(100)]
    model = functional(nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)))
    table = InstanceTable(1200)

    def losses(theta: dict[str, Tensor], batch: list[Tensor]) -> tuple[Tensor, None]:
        logits = model(theta, batch[0])
        return cross_entropy(logits, batch[1], reduction="none"), None  # no features for weights

    problem = ReweightingProblem[dict[str, Tensor], dict[str, Tensor], list[Tensor]](
        per_example_loss=losses,
        weights=lambda phi, batch, features: table.weights(phi, batch[2]),
        upper_loss=lambda theta, phi, batch: losses(theta, batch)[0].mean(),
    )
    solver = BilevelSolver(problem, AdamW(3e-3), LazyRowAdam(0.1))
    batches, figures = [batch for _ in range(30) for batch in noisy], {}
    runs = {"all weights 1": (batches, None), "clean rows alone": ([trusted] * 360, None)}
    for name, (lower, upper) in (runs | {"learned weights": (batches, trusted)}).items():
        state = solver.init(model.params, table.init())
        for batch in lower:
            state, _ = solver.step(state, [batch], upper)
        predicted = model(state.lower_params, x[test]).argmax(-1)
        figures[name] = (predicted == truth[test]).float().mean()
    weights = table.all_weights(state.upper_params)
    figures |= {"weight, wrong": weights[wrong].mean(), "weight, right": weights[~wrong].mean()}
    print(*(f"{name:18}{figure:.3f}" for name, figure in figures.items()), sep="\n")
    return {name: float(figure) for name, figure in figures.items()}


if __name__ == "__main__":
    main()
