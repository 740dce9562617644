"""Tree arithmetic, None leaves, and the named round trip that checkpoints rely on."""

from __future__ import annotations

from typing import NamedTuple

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bilevel import tree
from bilevel.optimizers.lazy import LazyRowAdam
from bilevel.optimizers.optimizers import SGD, Adagrad, Adam, AdamW


class Pair(NamedTuple):
    left: object
    right: object


def values(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


A = {"w": values(1.0, 2.0), "nested": [values(3.0), None]}
B = {"w": values(10.0, 20.0), "nested": [values(30.0), values(40.0)]}


def test_arithmetic_values() -> None:
    assert tree.vdot(A, B).item() == 1 * 10 + 2 * 20 + 3 * 30
    assert tree.norm(B).item() == pytest.approx((100 + 400 + 900 + 1600) ** 0.5, rel=1e-15)
    total = tree.axpy(2.0, A, B)
    assert total["w"].tolist() == [12.0, 24.0]
    assert [leaf.tolist() for leaf in total["nested"]] == [[36.0], [40.0]]
    assert tree.add(B, A)["nested"][1].tolist() == [40.0]
    assert tree.scale(3.0, A)["nested"][0].tolist() == [9.0]
    assert tree.scale(3.0, A)["nested"][1] is None
    assert tree.zeros_like(A, dtype=torch.float32)["w"].dtype == torch.float32
    assert [leaf.tolist() for leaf in tree.leaves(A)] == [[3.0], [1.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inner_products_of_large_leaves_are_as_exact_as_pairwise_sums(dtype) -> None:
    """Many blocks, the last one not full; transposed on one side; half precision."""
    torch.manual_seed(0)
    left, right = torch.randn(700, 801, dtype=dtype), torch.randn(801, 700, dtype=dtype).T
    exact = (left.double() * right.double()).sum()
    size = left.double().norm() * right.double().norm()
    found = tree.vdot({"w": left, "n": None}, {"w": right, "n": None})
    assert found.dtype == torch.float32
    assert abs(found - exact) / size <= 1e-8
    # Other precisions on both sides, which torch.dot does not take.
    assert tree.vdot(left, right.double()).item() == pytest.approx(exact.item(), rel=1e-12)


def test_map_is_none_where_any_leaf_is() -> None:
    assert tree.map(torch.add, B, A)["nested"][1] is None
    with pytest.raises(ValueError, match="nested"):
        tree.map(torch.add, A, {"w": A["w"]})


def test_norm_is_that_of_clip_grad_norm() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.zeros(7, 3))]
    torch.manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    grads = [parameter.grad.clone() for parameter in parameters]
    assert torch.equal(tree.norm(grads), torch.nn.utils.clip_grad_norm_(parameters, 1.0))


def test_half_precision_is_summed_in_float32() -> None:
    ones = {"w": torch.ones(5000, dtype=torch.bfloat16)}
    assert tree.vdot(ones, ones).item() == 5000.0
    assert tree.vdot(ones, ones).dtype == tree.norm(ones).dtype == torch.float32
    assert tree.norm(ones).item() == pytest.approx(5000**0.5, rel=1e-6)


def test_empty_trees() -> None:
    for empty in ({}, None, (), {"w": None}):
        assert tree.vdot(empty, empty).item() == 0.0
        assert tree.norm(empty).item() == 0.0
        assert tree.allfinite(empty).item() is True
        assert tree.flatten(empty) == {}
        assert tree.unflatten({}, empty) == empty


def test_allfinite() -> None:
    assert tree.allfinite(A).item() is True
    for bad in (float("nan"), float("inf")):
        assert tree.allfinite({"a": A, "b": values(0.0, bad)}).item() is False


def test_names_are_paths() -> None:
    example = Pair({"b.weight": values(1.0), "a": (values(2.0), None)}, [values(3.0)])
    assert tree.names(example) == ["left/a/0", "left/b.weight", "right/0"]
    assert tree.names(values(1.0)) == ["value"]
    assert len(tree.names(example, none_is_leaf=True)) == 4


def test_missing_names_are_those_of_leaves_that_are_none_in_the_part() -> None:
    assert tree.missing(A, B) == ["nested/1"]
    assert tree.missing(B, B) == []
    assert tree.missing({"w": None, "nested": [None, None]}, B) == ["nested/0", "nested/1", "w"]


def test_ambiguous_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a/b' twice.*rename the dict key"):
        tree.names({"a/b": values(1.0), "a": {"b": values(2.0)}})


def test_unflatten_names_what_is_wrong() -> None:
    named = tree.flatten(A)
    with pytest.raises(ValueError, match=r"missing \['nested/0'\], unexpected \['other'\]"):
        tree.unflatten({"w": named["w"], "other": named["nested/0"]}, A)
    with pytest.raises(ValueError, match=r"w: expected torch.float64 \(2,\), found .* \(1,\)"):
        tree.unflatten({**named, "w": values(1.0)}, A)
    with pytest.raises(ValueError, match=r"w: expected torch.float64 \(2,\), found torch.float32"):
        tree.unflatten({**named, "w": named["w"].float()}, A)


trees = st.recursive(
    st.none() | st.integers(0, 3).map(lambda size: torch.arange(size, dtype=torch.float32)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: Pair(*pair))
    ),
    max_leaves=8,
)


@given(trees)
def test_flatten_round_trip(example: tree.Tree) -> None:
    rebuilt = tree.unflatten(dict(reversed(tree.flatten(example).items())), example)
    assert optree.tree_structure(rebuilt) == optree.tree_structure(example)
    for old, new in zip(tree.leaves(example), tree.leaves(rebuilt), strict=True):
        assert old is new


@pytest.mark.parametrize(
    "optimizer", [SGD(0.1), SGD(0.1, 0.9), Adam(0.1), AdamW(0.1), Adagrad(0.1), LazyRowAdam(0.1)]
)
def test_optimizer_states_survive_a_safetensors_file(optimizer, tmp_path) -> None:
    """States after a step too: their small leaves are views of one buffer."""
    torch.manual_seed(0)
    params = {"a": torch.randn(3, 2), "b": torch.randn(4), "frozen": torch.randn(2)}
    grads = {"a": torch.randn(3, 2), "b": torch.randn(4), "frozen": None}
    params, state = optimizer.update(grads, optimizer.init(params), params)
    save_file(tree.flatten({"params": params, "state": state}), tmp_path / "state.safetensors")
    loaded = tree.unflatten(
        load_file(tmp_path / "state.safetensors"),
        {"params": params, "state": optimizer.init(params)},
    )
    assert type(loaded["state"]) is type(state)
    assert loaded["state"].steps.item() == 1
    for old, new in zip(
        tree.leaves((params, state)),
        tree.leaves((loaded["params"], loaded["state"])),
        strict=True,
    ):
        assert torch.equal(old, new)


def test_what_is_on_the_host_is_itself() -> None:
    given = {"a": torch.tensor(1.5), "b": torch.tensor([True, False])}
    found = tree.on_host(given)
    assert list(found) == ["a", "b"]
    assert all(found[name].data_ptr() == given[name].data_ptr() for name in given)
