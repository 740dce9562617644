"""The feature "gradient" of Instance Net: gradients of examples under the initial model.

They are computed once, before the first step, at the cost of one forward and backward pass per
example, and again for every file that a trained net weighs. Source and equations:
``weighting.gradients``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prm.digests import write_digest
from prm.placement import Placement
from recipes.method.objective import Objective
from recipes.models.loading import Examples
from recipes.tensor_file import write_tensors
from recipes.terminal import progress_bar
from weighting import SKETCH_WIDTH, GradientFeatures, example_gradients, leaf_scales, sketch

GRADIENT_FILE = "gradient.safetensors"
_SCALE = "scale."


class Gradients(NamedTuple):
    """The gradient features of a training set.

    Attributes:
        map: The map from gradients to features.
        features: The features of every example, [examples, features].
    """

    map: GradientFeatures
    features: Tensor


def fit_gradients(
    objective: Objective,
    params: Mapping[str, Tensor],
    data: Examples,
    placement: Placement,
    features: int,
    *,
    shown: bool = True,
) -> Gradients:
    """Return the gradient features of a training set, and the map that they were fitted to.

    The torch generators are left as they are.

    Args:
        objective: The losses; the lower one is differentiated.
        params: The trained parameters of the initial model.
        data: The training set.
        placement: Where the model computes.
        features: How many features an example has.
        shown: Whether a progress bar is shown.

    Raises:
        ValueError: The gradients differ in fewer directions.
        DataError: An example cannot be laid out for the model.
    """
    with torch.random.fork_rng():
        scales = leaf_scales(_gradients(objective, params, data, placement))
        sketches = _sketches(objective, params, data, placement, scales, shown=shown)
    known = GradientFeatures.fit(scales, sketches, features)
    return Gradients(known, known(sketches))


def gradient_features(
    objective: Objective,
    params: Mapping[str, Tensor],
    data: Examples,
    placement: Placement,
    known: GradientFeatures,
) -> Tensor:
    """Return the gradient features of a file, [examples, features], by the map of a run.

    Raises:
        ValueError: The run trained other parameters.
    """
    with torch.random.fork_rng():
        return known(
            _sketches(objective, params, data, placement, known.scales, known.mean.numel())
        )


def _sketches(
    objective: Objective,
    params: Mapping[str, Tensor],
    data: Examples,
    placement: Placement,
    scales: Mapping[str, float],
    width: int = SKETCH_WIDTH,
    *,
    shown: bool = True,
) -> Tensor:
    rows = []
    with progress_bar("gradients", len(data), shown=shown) as bar:
        for gradient in _gradients(objective, params, data, placement):
            rows.append(sketch(gradient, scales, width))
            bar.update()
    return torch.stack(rows)


def _gradients(
    objective: Objective, params: Mapping[str, Tensor], data: Examples, placement: Placement
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of the lower loss of every example."""
    front = objective.prm.front or (lambda batch: batch)
    placed = placement.batches(lambda row: front(data.batch([row])), len(data))
    return example_gradients(
        lambda lower, example: objective.per_example_loss(lower, example)[0],
        params,
        (placed(row) for row in range(len(data))),
    )


def write_gradient_map(directory: Path, known: GradientFeatures) -> None:
    """Write ``gradient.safetensors`` with its digest into the directory of a saved weighting."""
    tensors = {"mean": known.mean, "components": known.components.contiguous()}
    tensors |= {
        _SCALE + name: torch.tensor(scale, dtype=torch.float64)
        for name, scale in known.scales.items()
    }
    write_tensors(directory / GRADIENT_FILE, tensors)
    write_digest(directory / GRADIENT_FILE)


def read_gradient_map(directory: Path) -> GradientFeatures:
    """Read what ``write_gradient_map`` wrote.

    Raises:
        ValueError: The file is missing, or not such a file; the message names it.
    """
    path = directory / GRADIENT_FILE
    try:
        tensors = load_file(path)
        mean, components = tensors.pop("mean"), tensors.pop("components")
        scales = {name.removeprefix(_SCALE): float(value) for name, value in tensors.items()}
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected the map of gradients that a run with --features gradient writes; "
            f"found none ({error})"
        ) from error
    fits = mean.dim() == 1 and components.dim() == 2 and len(components) == len(mean)
    finite = mean.isfinite().all() and components.isfinite().all()
    if not (fits and finite and mean.dtype == components.dtype == torch.float32):
        raise ValueError(
            f"{path}: expected finite float32 numbers mean [width] and components [width, "
            f"features]; found {tuple(mean.shape)} and {tuple(components.shape)}"
        )
    return GradientFeatures(scales, mean, components)
