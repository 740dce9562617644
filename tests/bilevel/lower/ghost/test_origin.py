"""What is known of tensors: which come from the batch, and which have its rows in another order."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bilevel.lower.ghost.origin import Origin, Origins

X = torch.arange(12.0).view(4, 3)


class Follower(TorchFunctionMode):
    """Passes origins on, as the tracker does."""

    def __init__(self, batch):
        super().__init__()
        self.origins = Origins(batch)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = [item for a in args for item in (a if isinstance(a, list | tuple) else [a])]
        tensors = [
            value for value in (*values, *kwargs.values()) if isinstance(value, torch.Tensor)
        ]
        origin = max((self.origins.of(tensor) for tensor in tensors), default=Origin.CONSTANT)
        return self.origins.pass_on(func, args, kwargs, origin, func(*args, **kwargs))


def origin(function, batch=X):
    follower = Follower(batch)
    with follower:
        result = function(batch)
    return follower.origins.of(result)


EXAMPLES = {
    "itself": lambda x: x,
    "arithmetic with a constant": lambda x: torch.ones(3) - x,
    "one of several results": lambda x: x.split(1, dim=1)[2],
    "a row of an iteration": lambda x: list(x.T)[1],
    "integers": lambda x: x.long() % 2,
    "all rows by an index": lambda x: x[torch.arange(4), torch.tensor([2, 0, 1, 1])],
    "all rows by a mask": lambda x: x[torch.ones(4, dtype=torch.bool)],
    "columns by an index": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "sorted columns": lambda x: x.sort(dim=1).values,
    "flipped columns": lambda x: x.flip(1),
    "written into a constant": lambda x: torch.zeros(4, 3).copy_(x),
    "written into a view of a constant": lambda x: _written(torch.zeros(4, 6), x),
    "written by an index": lambda x: _set(torch.zeros(4, 3), x),
    "filled with rows in another order": lambda x: x.masked_scatter(x > 3, x[[2, 1, 0]]),
    "past torch's functions, with a graph": lambda x: _Same.apply(x.clone().requires_grad_()),
}
REORDERED = {
    "by an index": lambda x: x[torch.tensor([1, 0, 2, 3])],
    "by a list": lambda x: x[[0, 2, 1, 3]],
    "by a mask": lambda x: x[torch.tensor([True, False, True, True])],
    "by an index with another": lambda x: x[torch.tensor([0, 1]), torch.tensor([[0], [1]])],
    "by index_select": lambda x: x.index_select(0, torch.tensor([3, 2, 1, 0])),
    "gathered": lambda x: x.gather(0, torch.zeros(4, 3, dtype=torch.int64)),
    "sorted": lambda x: torch.sort(x, 0).values,
    "sorted numbers": lambda x: x[:, 0].sort().indices,
    "flipped": lambda x: x.flip(0),
    "rolled": lambda x: torch.roll(x, 1, 0),
    "looked up": lambda x: torch.nn.functional.embedding(torch.tensor([1, 1]), x),
    "and used further": lambda x: (x.flip(0) * 2 + x).T,
}
CONSTANT = {
    "a new tensor": lambda x: torch.ones(4, 3),
    "a new tensor like it": lambda x: torch.zeros_like(x) + x.new_ones(4, 3),
    "a cast to its precision": lambda x: torch.ones(4, 3, dtype=torch.float64).type_as(x),
    "through numbers": lambda x: torch.tensor(x.tolist()),
}


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, b):
        return b


def _written(target, x):
    target[:, :3].copy_(x)
    return target


def _set(target, x):
    target[torch.arange(4)] = x
    return target


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_computed_from_the_batch_has_its_rows(name):
    assert origin(EXAMPLES[name], X.clone()) is Origin.EXAMPLES


@pytest.mark.parametrize("name", REORDERED)
def test_rows_in_another_order_are_known(name):
    assert origin(REORDERED[name], X.clone()) is Origin.REORDERED


@pytest.mark.parametrize("name", CONSTANT)
def test_what_is_not_computed_from_the_batch_is_a_constant(name):
    assert origin(CONSTANT[name], X.clone()) is Origin.CONSTANT


def test_a_mark_of_an_earlier_run_is_void():
    kept = []
    assert origin(lambda x: kept.append(x + 1) or kept[0], X.clone()) is Origin.EXAMPLES
    assert origin(lambda x: kept[0], X.clone()) is Origin.CONSTANT


@dataclass
class Fields:
    x: torch.Tensor
    name: str = "fields"


class Plain:
    def __init__(self, x):
        self.x, self.self = x, self


@pytest.mark.parametrize(
    "wrap", [UserDict, Fields, Plain, lambda x: [({"x": x},)]], ids=lambda wrap: wrap.__name__
)
def test_tensors_are_found_in_batches_of_any_kind(wrap):
    x = X.clone()
    origins = Origins(wrap({"x": x} if wrap is UserDict else x))
    assert origins.of(x) is Origin.EXAMPLES
    assert origins.of(x.clone()) is Origin.CONSTANT
    assert origins.shapes == [(4, 3)]


def test_without_tensors_in_the_batch_every_tensor_may_be_of_the_examples():
    assert Origins(slice(0, 4)).of(X) is Origin.EXAMPLES
    assert origin(lambda rows: X[rows], [3, 1, 0]) is Origin.EXAMPLES
