"""Data distillation: ten synthetic images that teach a network to read digits.

The upper parameters φ are ten images, one per digit, real scans at first. The lower level is a new
random network θ_0 before every upper step, trained on nothing but these ten::

    minimise over φ   E_θ_0 mean_scans ℓ(θ_20(φ), scan)
    θ_{k+1} = θ_k − ½ ∇_θ mean_c ℓ(θ_k, (φ_c, c))         digits c = 0 … 9, steps k = 0 … 19

Look at the test accuracy of new networks after 20 steps on the distilled images, and on others.
Run: python examples/data_distillation.py   (scikit-learn holds the digits)
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bilevel import SGD, Adam, BilevelProblem, BilevelSolver, BilevelState, Unrolled, WarmupCosine


def main() -> dict[str, float]:
    """Distil; print and return the test accuracy of new networks for each training set."""
    torch.manual_seed(0)
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x, (train, test) = x.float() / 16, torch.randperm(1797).split([1200, 597])
    of_digit = [x[train[y[train] == digit]] for digit in range(10)]
    digits, scans = torch.arange(10), torch.stack([images[0] for images in of_digit])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss(theta: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, theta, images), labels)

    problem = BilevelProblem(loss, lambda theta, _, rows: loss(theta, x[rows], y[rows]))
    solver = BilevelSolver(problem, SGD(0.5), Adam(WarmupCosine(0.02, 0, 200)), Unrolled(), 20)

    def start(images: Tensor) -> BilevelState[dict[str, Tensor], Tensor]:
        theta = {name: torch.randn_like(leaf) / 8 for name, leaf in model.named_parameters()}
        return solver.init(theta, images)

    def accuracy(images: Tensor, labels: Tensor) -> float:
        states = [solver.window(start(images), [[labels]] * 20)[0] for _ in range(10)]
        logits = [functional_call(model, state.lower_params, x[test]) for state in states]
        return float((torch.stack(logits).argmax(-1) == y[test]).float().mean())

    state = start(scans)
    for _ in range(200):
        state, _ = solver.window(state, [[digits]] * 20, train[torch.randint(1200, (200,))])
        fresh = start(state.upper_params)  # another network; Adam's moments go on
        state = fresh._replace(upper_optimizer=state.upper_optimizer)
    means = torch.stack([images.mean(0) for images in of_digit])
    sets = {"ten scans": scans, "class means": means, "distilled": state.upper_params}
    figures = {name: accuracy(images, digits) for name, images in sets.items()}
    figures["1200 scans"] = accuracy(x[train], y[train])
    print(*(f"{name:12}{figure:.3f}" for name, figure in figures.items()), sep="\n")
    return figures


if __name__ == "__main__":
    main()
