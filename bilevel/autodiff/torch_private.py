"""torch's private functions that the package needs: nothing public does the same.

They may go or change with any release, so no other module names one, and
``tests/bilevel/autodiff/test_torch_private.py`` holds each to values that public functions give. It
also fails under a release that is not among ``TRIED``, and says what to check.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Releases of torch under which the tests have passed.
TRIED = ("2.13",)

# What of torch this module calls.
NAMES = ("torch._softmax_backward_data", "torch._C._functorch.peek_interpreter_stack")


def softmax_tangent(
    probabilities: Float[Tensor, "*batch keys"], tangent: Float[Tensor, "*batch keys"]
) -> Float[Tensor, "*batch keys"]:
    """Return ``P' = P (S' − Σ P S')``, the tangent of P = softmax(S) over the last dimension.

    One kernel, which public functions reach only through autograd: the softmax's own gradient,
    whose Jacobian is symmetric.

    Args:
        probabilities: P.
        tangent: S', in the precision of P.
    """
    return torch._softmax_backward_data(tangent, probabilities, -1, probabilities.dtype)


def transform_is_active() -> bool:
    """Return whether a transform of ``torch.func`` (``vmap``, ``jvp``, ``grad``) is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None
