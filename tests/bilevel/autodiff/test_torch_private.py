"""Private functions of torch do what public ones say they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bilevel
from bilevel.autodiff import torch_private
from bilevel.autodiff.torch_private import NAMES, TRIED, softmax_tangent, transform_is_active

# torch compiles some of its forward-mode formulas with its deprecated compiler.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit:DeprecationWarning")


def test_this_release_of_torch_was_tried():
    release = ".".join(torch.__version__.split(".")[:2])
    assert release in TRIED, (
        f"torch {release} is new here: see that {', '.join(NAMES)} still exist and mean what "
        f"{torch_private.__name__} says; if the other tests of this module pass, add it to TRIED"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_names_exist(name):
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert callable(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tangent_of_softmax(dtype):
    """By its formula, and by torch's forward mode; scores of -inf have no part in it."""
    scores, along = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype)
    scores[0, 1, 2:] = -torch.inf
    p, expected = torch.func.jvp(lambda s: torch.softmax(s, -1), (scores,), (along,))
    found = softmax_tangent(p, along)
    torch.testing.assert_close(found, p * (along - (p * along).sum(-1, keepdim=True)))
    torch.testing.assert_close(found, expected)
    assert found[0, 1, 2:].tolist() == [0.0, 0.0, 0.0]


def test_transforms_are_seen_while_they_last():
    seen = []

    def square(x):
        seen.append(transform_is_active())
        return x.square().sum()

    x = torch.ones(3)
    torch.func.grad(square)(x)
    torch.func.jvp(square, (x,), (x,))
    torch.func.vmap(square)(x)
    assert seen == [True, True, True]
    square(x)
    with torch.autograd.forward_ad.dual_level():
        square(torch.autograd.forward_ad.make_dual(x, x))
    torch.autograd.grad(square(x.requires_grad_()), x)
    assert seen[3:] == [False, False, False]


def test_no_other_module_names_a_private_function():
    private = re.compile(r"torch\._(?!_)\w+|from torch\.\S+ import .*\b_\w+")
    package = Path(bilevel.__file__).parent
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if private.search(path.read_text(encoding="utf-8"))
    }
    assert users == {"autodiff/torch_private.py"}
