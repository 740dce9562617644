"""Gradient features: gradients by hand, the projection as a matrix, components by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weighting import GradientFeatures, example_gradients, leaf_scales, sketch

WIDTH = 64
SIZES = {"a": (3, 7), "b": (150,), "c": ()}
SCALES = {"a": 2.0, "b": 0.5, "c": 3.0}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=random) for name, size in SIZES.items()}


def flat(gradient) -> torch.Tensor:
    return torch.cat([SCALES[name] * gradient[name].reshape(-1) for name in SIZES])


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    """The projection [width, entries], a column for each entry of unscaled leaves."""
    ones = dict.fromkeys(SIZES, 1.0)
    columns = []
    for name, size in SIZES.items():
        for entry in range(int(np.prod(size))):
            unit = {other: torch.zeros(shape) for other, shape in SIZES.items()}
            unit[name].view(-1)[entry] = 1.0
            columns.append(sketch(unit, ones, WIDTH))
    return torch.stack(columns, 1)


def test_example_gradients_are_those_of_the_loss_of_each_example_alone():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 0.5], dtype=torch.float64)
    params = {"w": torch.tensor([0.5, 0.25], dtype=torch.float64), "unused": torch.ones(2)}

    def loss(lower, example):
        return 0.5 * (example["x"] @ lower["w"] - example["y"]) ** 2

    examples = [{"x": x[i : i + 1], "y": y[i : i + 1]} for i in range(2)]
    found = list(example_gradients(loss, params, examples))
    for i in range(2):
        by_hand = (x[i] @ params["w"] - y[i]) * x[i]
        torch.testing.assert_close(found[i]["w"], by_hand, rtol=1e-15, atol=0)
        assert found[i]["unused"].eq(0).all()
    assert not params["w"].requires_grad


def test_scales_are_one_over_the_root_mean_square_of_the_first_gradients():
    gradients = [
        {"w": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2)},
        {"w": torch.tensor([0.0, 5.0]), "zero": torch.zeros(2)},
    ]
    scales = leaf_scales(gradients)
    assert scales == {"w": pytest.approx((50 / 4) ** -0.5, rel=1e-12), "zero": 0.0}
    later = gradients * 64 + [{"w": torch.full((2,), 1e6), "zero": torch.ones(2)}]
    assert leaf_scales(later) == scales
    with pytest.raises(ValueError, match="at least one gradient"):
        leaf_scales([])


def test_the_projection_is_a_count_sketch(matrix):
    """One entry ±1 in every column, and no two of one piece of a leaf in the same place."""
    assert matrix.abs().sum(0).eq(1).all()
    assert matrix.abs().amax(0).eq(1).all()
    piece = matrix[:, 21 : 21 + WIDTH]
    assert torch.equal(piece.T @ piece, torch.eye(WIDTH))
    signs = matrix.sum(0)
    assert int((signs > 0).sum()) == pytest.approx(matrix.shape[1] / 2, abs=matrix.shape[1] ** 0.5)


def test_a_sketch_is_the_projection_of_the_scaled_gradient(matrix):
    gradient = drawn(1)
    torch.testing.assert_close(
        sketch(gradient, SCALES, WIDTH), matrix @ flat(gradient), rtol=1e-5, atol=1e-5
    )
    double = {name: leaf.double() for name, leaf in gradient.items()}
    assert sketch(double, SCALES, WIDTH).dtype == torch.float32
    with pytest.raises(ValueError, match="expected the gradients of a, b, c; found those of a"):
        sketch({"a": gradient["a"]}, SCALES, WIDTH)


def test_sketches_keep_inner_products():
    """Root mean square error over pairs: that of a count sketch, width ** -1/2 of the lengths.

    Every other one has a mean far from 0, which a sketch with a sign a piece would not keep.
    """
    random = torch.Generator().manual_seed(0)
    leaves = torch.randn(24, 20_000, generator=random, dtype=torch.float64)
    leaves[::2] += 3 * torch.randn(12, 1, generator=random)
    sketches = torch.stack([sketch({"x": leaf}, {"x": 1.0}, 1024) for leaf in leaves]).double()
    lengths = leaves.norm(dim=1)
    error = (sketches @ sketches.T - leaves @ leaves.T) / (lengths[:, None] * lengths[None, :])
    apart = error[~torch.eye(24, dtype=torch.bool)]
    assert float(apart.square().mean().sqrt()) == pytest.approx(1024**-0.5, rel=0.25)


@pytest.mark.parametrize("examples", [12, 90])
def test_features_are_the_principal_components_of_sketches_of_unit_length(examples):
    random = np.random.default_rng(examples)
    sketches = random.normal(size=(examples, 30)) * np.linspace(3, 0.2, 30)
    unit = sketches / np.linalg.norm(sketches, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    expected = centred @ np.linalg.svd(centred, full_matrices=False)[2][:4].T
    expected /= np.sqrt((expected**2).mean())
    known = GradientFeatures.fit({"x": 1.0}, torch.from_numpy(sketches).float(), 4)
    found = known(torch.from_numpy(sketches).float()).double().numpy()
    for column in range(4):
        sign = np.sign(found[:, column] @ expected[:, column])
        np.testing.assert_allclose(sign * found[:, column], expected[:, column], atol=2e-4)
    assert (known.components[known.components.abs().argmax(0), range(4)] > 0).all()


def test_a_gradient_of_zero_stays_and_length_does_not_matter():
    sketches = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))
    sketches[4] = 0
    known = GradientFeatures.fit({"x": 1.0}, sketches, 2)
    features = known(sketches)
    assert features.isfinite().all()
    torch.testing.assert_close(features[4], -known.mean @ known.components)
    torch.testing.assert_close(known(7 * sketches), features)


@pytest.mark.parametrize(
    ("sketches", "there"),
    [(torch.ones(6, 8), 0), (torch.eye(3, 8), 2), (torch.eye(8)[:, :3].contiguous(), 3)],
)
def test_too_few_directions_are_refused(sketches, there):
    with pytest.raises(ValueError, match=f"differ in 5 directions or more; found {there} in"):
        GradientFeatures.fit({"x": 1.0}, sketches, 5)
