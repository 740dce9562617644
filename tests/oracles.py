"""Independent answers: finite differences, per-example loops, closed forms, golden numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import tree


def slope(function, params, direction, step=2e-3) -> float:
    """Directional derivative by central differences, extrapolated to fourth order."""

    def central(size):
        ahead = function(tree.axpy(size, direction, params))
        behind = function(tree.axpy(-size, direction, params))
        return float(ahead - behind) / (2 * size)

    return (4 * central(step / 2) - central(step)) / 3


def random_like(params, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return tree.map(
        lambda leaf: torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator), params
    )


def lower_gradient(problem, params, upper_params, batch, random=None):
    """∇_θ of the lower loss on one batch, by the plainest autograd; None where unused."""
    leaves = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
    if random is not None:
        torch.set_rng_state(random)
    loss = problem.lower_loss(leaves, upper_params, batch)
    names = tree.names(leaves)
    found = torch.autograd.grad(loss, tree.leaves(leaves), allow_unused=True)
    assert isinstance(leaves, dict)
    assert sorted(names) == sorted(leaves)
    return dict(zip(names, found, strict=True))


def by_double_backward(case, direction):
    """∇ ⟨∇_θ L, v⟩ by the plainest autograd."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.params.items()}
    torch.manual_seed(11)
    with sdpa_kernel(SDPBackend.MATH):
        loss = case.problem.lower_loss(leaves, case.upper_params, case.batch)
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        along = sum((g * direction[name]).sum() for name, g in zip(leaves, grads, strict=True))
        found = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if one is None else one
        for (name, leaf), one in zip(leaves.items(), found, strict=True)
    }


def upper_after_step(problem, optimizer, params, state, batch, upper_batch, random, at):
    """φ -> L_upper(θ'(φ), φ), the clip scale held at that of φ = `at` unless differentiated."""
    if optimizer.max_norm is not None and not optimizer.differentiate_clip:
        norm = tree.norm(lower_gradient(problem, params, at, batch, random))
        scale = min(1.0, optimizer.max_norm / (float(norm) + 1e-6))
        optimizer = replace(optimizer, max_norm=None)
    else:
        scale = 1.0

    def function(upper_params) -> Tensor:
        grads = tree.scale(scale, lower_gradient(problem, params, upper_params, batch, random))
        new_params, _ = optimizer.update(grads, state, params)
        torch.set_rng_state(random)
        with torch.no_grad():
            return problem.upper_loss(new_params, upper_params, upper_batch)

    return function


def upper_after_window(problem, optimizer, params, state, batches, upper_batch, at, unrolled):
    """φ -> L_upper(θ_K(φ), φ) through the last `unrolled` steps, the point before them held.

    The clip scales are those of φ = `at`, unless they are differentiated. Random numbers start
    from torch's present state; the upper loss draws from where the last step did.
    """
    held = optimizer.max_norm is not None and not optimizer.differentiate_clip
    random, scales = torch.get_rng_state(), []

    def steps(upper_params, params, state, batches, scales=None):
        for index, step in enumerate(batches):
            start = torch.get_rng_state()
            sizes = [len(batch["labels"]) for batch in step]
            grads = None
            for size, batch in zip(sizes, step, strict=True):
                term = lower_gradient(problem, params, upper_params, batch)
                grads = tree.axpy(size / sum(sizes), term, grads or tree.map(lambda _: None, term))
            if scales is None:
                clipped = optimizer
                if held:
                    norm = float(tree.norm(grads))
                    taken.append(min(1.0, optimizer.max_norm / (norm + 1e-6)))
            else:
                clipped = replace(optimizer, max_norm=None) if held else optimizer
                grads = tree.scale(scales[index], grads) if held else grads
            params, state = clipped.update(grads, state, params)
        return params, state, start

    taken: list[float] = []
    count = len(batches) - unrolled
    first = params, state
    if count:
        first = steps(at, params, state, batches[:count])[:2]
    middle = torch.get_rng_state()
    taken.clear()
    steps(at, *first, batches[count:])
    scales = list(taken)
    torch.set_rng_state(random)

    def function(upper_params) -> Tensor:
        torch.set_rng_state(middle)
        last, _, start = steps(upper_params, *first, batches[count:], scales)
        torch.set_rng_state(start)
        with torch.no_grad():
            return problem.upper_loss(last, upper_params, upper_batch)

    return function


def per_example_gradients(problem, params, batch, random=None) -> list[dict[str, Tensor]]:
    """One backward pass per example of the batch; zeros where a parameter is not used."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    if random is not None:
        torch.set_rng_state(random)
    losses, _ = problem.per_example_loss(leaves, batch)
    result = []
    for loss in losses:
        found = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, retain_graph=True
        )
        result.append(
            {
                name: torch.zeros_like(leaf) if gradient is None else gradient
                for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
            }
        )
    return result


# The regression of the golden numbers below: lower loss ½ Σ s_i (x_i·w − y_i)², upper loss
# ½ ‖X_v w − y_v‖², both sums; s is the upper parameter.
REGRESSION = {
    "x": torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64),
    "y": torch.tensor([0.0, 1.0, 1.0, 3.0], dtype=torch.float64),
}
VALIDATION = {
    "x": torch.tensor([[1.0, 1.5], [1.0, 2.5]], dtype=torch.float64),
    "y": torch.tensor([1.0, 2.0], dtype=torch.float64),
}
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)


def half_squares(params, batch) -> Tensor:
    """½ (x_i·w − y_i)², [batch]."""
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]).square()
