"""Gradient features: what the gradient of each example's loss points at, in a few numbers.

The hypergradient of the weight of example i is ``-<v, g_i>``, the product of a direction v that the
meta loss chooses with the gradient g_i of the example's loss. So a network tells good examples from
bad ones as well as its inputs show g_i. What a model *says* of a step (its probability, the label,
the loss) shows one number of it; two labels that are right by different conventions can be equal
in all of them. These features show the directions in which the gradients differ most:

    s_i = S [g_i,l / rms_l]_l,        f_i = V' (s_i / |s_i| - mean) / scale,

with the gradient g_i,l of each leaf l under the initial model, the root mean square rms_l of its
entries over the first examples, a random projection S (a count sketch) to ``width`` numbers, which
keeps inner products up to a relative error of about ``width ** -0.5``, and the leading principal
components V of the file's sketches. Cost: one gradient per example, once.

Source: gradients of examples, projected at random, to select training data: Park et al., TRAK
(arXiv 2303.14186), Xia et al., LESS (arXiv 2402.04333); count sketch: Charikar, Chen, Farach-Colton
(2002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from weighting.base import Params

Gradients = Mapping[str, Tensor]

SKETCH_WIDTH = 4096
_SHOWN = 128  # Examples whose gradients give the scale of every leaf.
_SEED = 0  # Of the projection, which is the same for all models with the same leaves.


def example_gradients(
    loss: Callable[[Params, Mapping[str, Tensor]], Tensor],
    params: Params,
    examples: Iterable[Mapping[str, Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of ``loss(params, example)``, a scalar or [1], for each example alone.

    Leaves that the loss does not depend on have the gradient 0.

    Args:
        loss: The loss of a batch of one example.
        params: The point at which it is differentiated; it is not changed.
        examples: Batches of one example each.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    for example in examples:
        value = loss(leaves, example).sum()
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        yield dict(zip(leaves, found, strict=True))


def leaf_scales(gradients: Iterable[Gradients]) -> dict[str, float]:
    """Return 1 / rms of the entries of each leaf over the first 128 gradients; 0 for a leaf of 0.

    Raises:
        ValueError: There is no gradient.
    """
    squares: dict[str, Tensor] = {}
    count = 0
    for gradient in islice(gradients, _SHOWN):
        count += 1
        for name, leaf in gradient.items():
            mean = leaf.detach().double().square().mean()
            squares[name] = squares[name] + mean if name in squares else mean
    if not count:
        raise ValueError("leaf_scales needs at least one gradient; found none")
    roots = {name: float((total / count).sqrt()) for name, total in squares.items()}
    return {name: 1 / root if root > 0 else 0.0 for name, root in roots.items()}


def sketch(
    gradient: Gradients, scales: Mapping[str, float], width: int = SKETCH_WIDTH
) -> Float[Tensor, " width"]:
    """Return the count sketch of a gradient whose leaves are multiplied by ``scales``, in float32.

    Each leaf is cut into pieces of ``width`` entries; the entries of each piece are multiplied by
    random signs, those of their places and one of the piece, the piece is turned round by a random
    shift, and all are added. The expectation of the product of two sketches
    is the product of the scaled gradients. The projection depends on names and sizes of the leaves
    alone; it takes memory of the size of the largest leaf.

    Raises:
        ValueError: The leaves are not those of ``scales``.
    """
    if set(gradient) != set(scales):
        raise ValueError(
            f"expected the gradients of {', '.join(scales)}; found those of {', '.join(gradient)}"
        )
    random = torch.Generator().manual_seed(_SEED)
    total = torch.zeros(width)
    of_places = torch.randint(2, (width,), generator=random) * 2 - 1
    for name in sorted(scales):
        flat = gradient[name].detach().reshape(-1)
        pieces = -(-flat.numel() // width)
        shifts = torch.randint(width, (pieces, 1), generator=random)
        signs = torch.randint(2, (pieces, 1), generator=random) * 2 - 1
        places = ((torch.arange(width) + shifts) % width).reshape(-1)[: flat.numel()]
        factors = (scales[name] * signs * of_places).reshape(-1)[: flat.numel()]
        total.index_add_(0, places, flat.float().cpu() * factors)
    return total


@dataclass(frozen=True)
class GradientFeatures:
    """The map from gradients to features.

    Attributes:
        scales: The factor of each leaf, by name.
        mean: The mean of the sketches of unit length, [width].
        components: The principal components divided by the scale, [width, features].
    """

    scales: Mapping[str, float]
    mean: Float[Tensor, " width"]
    components: Float[Tensor, "width features"]

    @classmethod
    def fit(
        cls, scales: Mapping[str, float], sketches: Float[Tensor, "examples width"], features: int
    ) -> GradientFeatures:
        """Return the map to the leading principal components of ``sketches``.

        The features of these sketches have mean 0 each, and mean square 1 over all. A component's
        largest entry is positive.

        Args:
            scales: The factors with which the sketches were made.
            sketches: The sketches of a file of examples.
            features: How many components.

        Raises:
            ValueError: Fewer than ``features`` + 1 different gradients, so that there are not as
                many components.
        """
        unit = _unit(sketches).double()
        mean = unit.mean(0)
        rest = unit - mean
        # The components from the smaller of the two Gram matrices, and the same ones.
        short = len(rest) <= rest.shape[1]
        values, vectors = torch.linalg.eigh(rest @ rest.T if short else rest.T @ rest)
        values, vectors = values.flip(0)[:features], vectors.flip(1)[:, :features]
        floor = 1e-10 * float(values[0]) if len(values) else 0.0
        if len(values) < features or float(values[-1]) <= floor:
            there = int((values > floor).sum()) if floor > 0 else 0
            raise ValueError(
                f"expected gradients of examples that differ in {features} directions or more; "
                f"found {there} in {len(sketches)} examples"
            )
        components = rest.T @ (vectors / values.sqrt()) if short else vectors
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        components = components * largest.sign()
        scale = (values.sum() / (len(rest) * features)).sqrt()
        return cls(dict(scales), mean.float(), (components / scale).float())

    def __call__(
        self, sketches: Float[Tensor, "examples width"]
    ) -> Float[Tensor, "examples features"]:
        """Return the features of examples from their sketches."""
        return (_unit(sketches) - self.mean) @ self.components


def _unit(sketches: Tensor) -> Tensor:
    """Divide every row by its length; a row of 0 stays."""
    return torch.nn.functional.normalize(sketches, dim=-1, eps=1e-30)
