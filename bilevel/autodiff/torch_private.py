"""torch's private functions that the package needs, since no public function does the same.

Any release may remove or change them, so no other module uses one, and
``tests/bilevel/autodiff/test_torch_private.py`` compares each with values of public functions. The
test also fails under a release that is not among ``TRIED``, with a message on what to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

# Releases of torch under which the tests have passed.
TRIED = ("2.13",)

# The private functions of torch that this module calls.
NAMES = (
    "torch._softmax_backward_data",
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.maybe_current_level",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._functorch.pyfunctorch.temporarily_pop_interpreter_stack",
    "torch._C._set_grad_enabled",
    "torch._C._set_fwd_grad_enabled",
    "torch._C._is_fwd_grad_enabled",
    "torch._weight_norm",
    "torch.autograd.graph._engine_run_backward",
    "torch._C.DisableTorchFunction",
    "torch._fused_adamw_",
    "torch._foreach_add",
    "torch._foreach_add_",
    "torch._foreach_clamp_min_",
    "torch._foreach_div",
    "torch._foreach_mul",
    "torch._foreach_mul_",
    "torch._foreach_norm",
    "torch._foreach_div_",
    "torch._foreach_sqrt",
    "torch._debug_has_internal_overlap",
)

# What ``torch.optim`` itself calls: one kernel, or one call, for a list of tensors.
fused_adamw_ = torch._fused_adamw_
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_clamp_min_ = torch._foreach_clamp_min_
foreach_div = torch._foreach_div
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_div_ = torch._foreach_div_
foreach_sqrt = torch._foreach_sqrt

# What ``torch.no_grad`` and its like call, as a ``TorchFunctionMode`` sees it.
SET_GRAD_MODE = torch._C._set_grad_enabled

# What modules with weight normalisation call, as a ``TorchFunctionMode`` sees it.
WEIGHT_NORM = torch._weight_norm


def softmax_tangent(
    probabilities: Float[Tensor, "*batch keys"], tangent: Float[Tensor, "*batch keys"]
) -> Float[Tensor, "*batch keys"]:
    """Return ``P' = P (S' − Σ P S')``, the tangent of P = softmax(S) over the last dimension.

    Since the Jacobian of the softmax is symmetric, one call of the kernel of its gradient computes
    this. Public functions reach that kernel only through autograd.

    Args:
        probabilities: The probabilities P.
        tangent: The tangent S' of the scores, in the precision of P.
    """
    return torch._softmax_backward_data(tangent, probabilities, -1, probabilities.dtype)


def transform_is_active() -> bool:
    """Return whether a transform of ``torch.func`` (``vmap``, ``jvp``, ``grad``) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def moves_forward(value: Tensor) -> bool:
    """Return whether a tensor has a tangent, at whatever level of nested transforms.

    False under ``torch.vmap``, which cannot unpack dual numbers.
    """
    try:
        if forward_ad.unpack_dual(value).tangent is not None:
            return True
    except RuntimeError:
        return False
    functorch = torch._C._functorch
    level = functorch.maybe_current_level()
    if not functorch.is_functorch_wrapped_tensor(value) or level is None or level <= 1:
        return False
    below = functorch.get_unwrapped(value)
    with temporarily_pop_interpreter_stack():
        return moves_forward(below)


def set_forward_gradients(on: bool) -> None:
    """Switch the tangents of forward mode on or off, as ``torch.set_grad_enabled`` does graphs."""
    torch._C._set_fwd_grad_enabled(on)


def forward_gradients_are_on() -> bool:
    """Return whether operations compute tangents.

    ``torch.no_grad`` leaves this as it is. ``torch.inference_mode`` switches it off, and so does
    torch around the forward of a custom ``autograd.Function``.
    """
    on: bool = torch._C._is_fwd_grad_enabled()
    return on


def run_backward(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    accumulate: bool = False,
) -> Sequence[Tensor | None]:
    """Return what ``torch.autograd.grad`` returns, None for inputs that no output depends on.

    That function takes a torch function mode off before its backward pass; this one leaves it on,
    so that the mode sees what the backward pass recomputes.

    Args:
        outputs: What is differentiated.
        inputs: With respect to what.
        cotangents: One cotangent per output; None: ones, for scalars.
        create_graph: Whether the result can be differentiated again.
        accumulate: Add the gradients to ``inputs[i].grad`` and return nothing, as
            ``torch.autograd.backward`` does.
    """
    if cotangents is None:
        cotangents = [torch.ones_like(output) for output in outputs]
    gradients: Sequence[Tensor | None] = torch.autograd.graph._engine_run_backward(
        tuple(outputs),
        tuple(cotangents),
        create_graph,
        create_graph,
        tuple(inputs),
        True,
        accumulate_grad=accumulate,
    )
    return gradients


def function_modes_off() -> AbstractContextManager[None]:
    """Return a context in which torch functions are called past all torch function modes."""
    off: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return off


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether entries of a tensor are known to share memory, as in an expanded one."""
    return bool(torch._debug_has_internal_overlap(tensor) == 1)
