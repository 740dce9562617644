"""A gradient with a graph has the bits of one without, or the loss is said to be unsuitable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bilevel.autodiff.second_derivative import has_second_derivative
from tests.bilevel.operation_case import Case, leaves
from tests.bilevel.operations import OPERATIONS


def gradients(operation, create_graph: bool) -> tuple[bool, list[Tensor]]:
    case = Case(operation)
    lower = leaves(case.lower)
    torch.manual_seed(0)
    loss = case.losses(lower, case.batch).sum()
    suitable = has_second_derivative(loss, lower.values())
    grads = torch.autograd.grad(
        loss, list(lower.values()), create_graph=create_graph, allow_unused=True
    )
    return suitable, [torch.zeros(()) if grad is None else grad for grad in grads]


def has_first_derivative(operation) -> bool:
    return operation.name != "native_channel_shuffle"


@pytest.mark.parametrize(
    "operation",
    [one for one in OPERATIONS if has_first_derivative(one)],
    ids=lambda operation: operation.name,
)
def test_the_gradient_of_a_suitable_loss_has_the_same_bits(operation):
    suitable, plain = gradients(operation, create_graph=False)
    _, graph = gradients(operation, create_graph=True)
    for one, other in zip(plain, graph, strict=True):
        same = torch.equal(one.to_dense(), other.detach().to_dense())
        assert same or not suitable


def test_few_operations_are_unsuitable():
    names = [
        operation.name
        for operation in filter(has_first_derivative, OPERATIONS)
        if not gradients(operation, create_graph=False)[0]
    ]
    assert names == [
        "silu",
        "mish",
        "group_norm",
        "embedding (scale_grad_by_freq)",
        "scaled_dot_product_attention",
        "… causal",
        "… with a mask",
        "… grouped",
        "MultiheadAttention",
        "TransformerEncoderLayer (evaluation)",
        "weight_norm",
    ]


def test_an_lstm_in_float32_has_a_kernel_of_its_own():
    """Its gradient with a graph is computed by other operations (in float64 by the same)."""
    torch.manual_seed(0)
    lstm, given = torch.nn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    assert not has_second_derivative(lstm(given)[0].sum(), lstm.parameters())
    lstm, given = lstm.double(), given.double()
    assert has_second_derivative(lstm(given)[0].sum(), lstm.parameters())


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


class Whole(Cut):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


@pytest.mark.parametrize(("function", "suitable"), [(Cut, False), (Whole, True)])
def test_a_custom_function_that_cuts_its_graph_is_unsuitable(function, suitable):
    x = torch.randn(3, requires_grad=True)
    assert has_second_derivative(function.apply(x.sin()).sum(), [x]) is suitable


def test_the_graph_is_looked_at_up_to_the_inputs():
    x = torch.randn(3, requires_grad=True)
    middle = functional.silu(x)
    assert not has_second_derivative(middle.sin().sum(), [x])
    assert has_second_derivative(middle.sin().sum(), [middle])
