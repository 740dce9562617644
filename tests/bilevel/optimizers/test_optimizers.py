"""Updates against torch.optim, leaf handling, precision, errors."""

from __future__ import annotations

import ast
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bilevel import tree
from bilevel.optimizers import rules
from bilevel.optimizers.base import clip_scale
from bilevel.optimizers.buckets import BUCKET_ENTRIES, bucket_indices
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.optimizers import SGD, Adagrad, Adam, AdamW, RMSProp
from bilevel.optimizers.schedule import WarmupCosine
from bilevel.optimizers.variants import AdaDelta, Adamax, NAdam, RAdam

STEPS = 100
SCHEDULE = WarmupCosine(0.05, 10, STEPS, floor=0.001)


def make_params(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"layer.weight": (4, 3), "layer.bias": (4,), "scale": (), "head": (2, 2, 2)}
    return {
        name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def loss(params: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    """Convex (a diverging run would amplify rounding), with a different target at each step."""
    total = sum((p - 0.1 * (step % 7) - 0.3).pow(2).sum() for p in params.values())
    return total + torch.cosh(params["head"].sum() - params["scale"])


def trajectory(optimizer, params):
    state = optimizer.init(params)
    for step in range(STEPS):
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = dict(
            zip(leaves, torch.autograd.grad(loss(leaves, step), leaves.values()), strict=True)
        )
        with torch.no_grad():
            params, state = optimizer.update(grads, state, params)
    return params, state


@pytest.fixture(autouse=True)
def torch_counts_in_float64():
    """torch.optim.NAdam keeps its product of momenta in the default precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def torch_trajectory(make, params, *, max_norm=None, schedule=None):
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = make(leaves)
    for step in range(STEPS):
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
        optimizer.zero_grad()
        loss(leaves, step).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves.values(), max_norm)
        optimizer.step()
    return {name: p.detach() for name, p in leaves.items()}


PAIRS = {
    "sgd": (SGD(0.05, weight_decay=0.1), torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (SGD(0.05, 0.9), torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        SGD(0.05, 0.9, nesterov=True, weight_decay=0.01),
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adam": (
        Adam(0.05, (0.8, 0.99), 1e-6, weight_decay=0.1),
        torch.optim.Adam,
        {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "adamw": (AdamW(0.05, weight_decay=0.2), torch.optim.AdamW, {"weight_decay": 0.2}),
    "rmsprop": (
        RMSProp(0.05, beta=0.9, weight_decay=0.1),
        torch.optim.RMSprop,
        {"alpha": 0.9, "weight_decay": 0.1},
    ),
    "adagrad": (Adagrad(0.05, weight_decay=0.1), torch.optim.Adagrad, {"weight_decay": 0.1}),
    "nadam": (
        NAdam(0.05, (0.8, 0.99), 1e-6, momentum_decay=0.05, weight_decay=0.1),
        torch.optim.NAdam,
        {"betas": (0.8, 0.99), "eps": 1e-6, "momentum_decay": 0.05, "weight_decay": 0.1},
    ),
    "radam": (
        RAdam(0.05, (0.8, 0.99), 1e-6, weight_decay=0.1),
        torch.optim.RAdam,
        {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "adamax": (
        Adamax(0.05, (0.8, 0.9), weight_decay=0.1),
        torch.optim.Adamax,
        {"betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
    "adadelta": (
        AdaDelta(0.05, rho=0.95, eps=1e-3, weight_decay=0.1),
        torch.optim.Adadelta,
        {"rho": 0.95, "eps": 1e-3, "weight_decay": 0.1},
    ),
}
ADAPTIVE = ("adam", "adamw", "rmsprop", "adagrad", "nadam", "radam", "adamax", "adadelta")


def assert_same(found, expected) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_hundred_steps_are_those_of_torch(name, scheduled, max_norm) -> None:
    optimizer, torch_class, arguments = PAIRS[name]
    optimizer = replace(optimizer, max_norm=max_norm, lr=SCHEDULE if scheduled else optimizer.lr)
    found, state = trajectory(optimizer, make_params())
    expected = torch_trajectory(
        lambda leaves: torch_class(leaves.values(), lr=0.05, **arguments),
        make_params(),
        max_norm=max_norm,
        schedule=SCHEDULE if scheduled else None,
    )
    assert_same(found, expected)
    assert state.steps.item() == STEPS
    assert state.steps.dtype == torch.int64


@pytest.mark.parametrize("name", PAIRS)
def test_decay_mask_is_torch_parameter_groups(name) -> None:
    optimizer, torch_class, arguments = PAIRS[name]
    optimizer = replace(
        optimizer,
        weight_decay=0.3,
        max_norm=0.5,
        decay_mask=lambda leaf: leaf.endswith("weight"),
    )
    found, _ = trajectory(optimizer, make_params())

    def make(leaves):
        decayed = [p for leaf, p in leaves.items() if leaf.endswith("weight")]
        others = [p for leaf, p in leaves.items() if not leaf.endswith("weight")]
        groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
        return torch_class(groups, lr=0.05, **{**arguments, "weight_decay": 0.0})

    assert_same(found, torch_trajectory(make, make_params(), max_norm=0.5))


def own_group(leaf: str) -> str:
    return "head" if leaf == "head" else "body"


@pytest.mark.parametrize("name", PAIRS)
def test_groups_are_torchs_parameter_groups(name) -> None:
    optimizer, torch_class, arguments = PAIRS[name]
    found, _ = trajectory(
        replace(
            optimizer,
            lr={"head": 0.01, "body": SCHEDULE},
            weight_decay={"head": 0.3, "body": 0.0},
            group=own_group,
            max_norm=0.5,
        ),
        make_params(),
    )
    leaves = {leaf: torch.nn.Parameter(p) for leaf, p in make_params().items()}
    others = [p for leaf, p in leaves.items() if leaf != "head"]
    groups = [
        {"params": [leaves["head"]], "lr": 0.01, "weight_decay": 0.3},
        {"params": others, "lr": 0.0, "weight_decay": 0.0},
    ]
    expected = torch_class(groups, **{**arguments, "weight_decay": 0.0})
    for step in range(STEPS):
        expected.param_groups[1]["lr"] = SCHEDULE(step)
        expected.zero_grad()
        loss(leaves, step).backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), 0.5)
        expected.step()
    assert_same(found, {leaf: p.detach() for leaf, p in leaves.items()})


def test_groups_without_a_rate_and_rates_without_groups_are_refused() -> None:
    params = make_params()
    optimizer = SGD({"body": 0.1}, group=own_group)
    with pytest.raises(
        ValueError, match=r"SGD: lr has values for the groups \['body'\], but .* 'head'; add it"
    ):
        optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ValueError, match=r"AdamW: weight_decay has values for .*give group"):
        AdamW(0.1, weight_decay={"head": 0.1})
    with pytest.raises(ValueError, match=r"SGD: lr\['body'\] must lie in \[0, inf\), got -1"):
        SGD({"body": -1.0}, group=own_group)


@pytest.mark.parametrize("name", PAIRS)
def test_a_resumed_run_is_the_uninterrupted_one(name) -> None:
    """Bit for bit, through named tensors; TorchOpt's own momentum forgets its buffer here."""
    optimizer = PAIRS[name][0]
    params = make_params()
    grads = tree.map(torch.sin, params)
    state = optimizer.init(params)
    for _ in range(3):
        params, state = optimizer.update(grads, state, params)
    copy = tree.unflatten(tree.flatten(state), optimizer.init(params))
    expected = optimizer.update(grads, state, params)
    for old, new in zip(
        tree.leaves(expected),
        tree.leaves(pickle.loads(pickle.dumps(optimizer)).update(grads, copy, params)),
        strict=True,
    ):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", PAIRS)
def test_update_is_pure_and_leaves_frozen_parameters_alone(name) -> None:
    optimizer = replace(PAIRS[name][0], max_norm=0.1)
    params = make_params()
    grads = {**tree.map(torch.cos, params), "layer.bias": None}
    state = optimizer.init(params)
    params, state = optimizer.update({**grads, "layer.bias": params["layer.bias"]}, state, params)
    before = [leaf.clone() for leaf in tree.leaves((grads, state, params))]
    new_params, new_state = optimizer.update(grads, state, params)
    for old, now in zip(before, tree.leaves((grads, state, params)), strict=True):
        assert torch.equal(old, now)
    assert new_params["layer.bias"] is params["layer.bias"]
    for old_moment, moment in zip(state[1:], new_state[1:], strict=True):
        assert moment is old_moment is None or moment["layer.bias"] is old_moment["layer.bias"]
    assert not torch.equal(new_params["head"], params["head"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_descent_has_the_bits_of_the_rule_on_joined_leaves(dtype) -> None:
    """SGD alone goes leaf by leaf; the general update joins small leaves."""
    params = make_params(dtype)
    grads = tree.map(lambda leaf: torch.randn(leaf.shape).float(), params) | {"scale": None}
    for optimizer in (SGD(0.1), SGD(SCHEDULE)):
        state = optimizer.init(params)
        found, after = optimizer.update(grads, state, params)
        expected, _ = ElementwiseOptimizer.update(optimizer, grads, state, params)
        assert int(after.steps) == 1
        for name, leaf in expected.items():
            assert torch.equal(found[name], leaf)
            assert found[name].dtype == dtype
    with pytest.raises(ValueError, match="gradient of 'head'"):
        SGD(0.1).update(grads | {"head": torch.ones(2)}, state, params)


def test_zero_learning_rate_changes_nothing() -> None:
    params = make_params()
    for optimizer in (AdamW(0.0), SGD(0.0, 0.9)):
        new_params, _ = optimizer.update(params, optimizer.init(params), params)
        for name, value in params.items():
            assert torch.equal(new_params[name], value)


def test_buckets_do_not_change_values() -> None:
    """Many small leaves, one large, two dtypes: as if each were alone."""
    torch.manual_seed(1)
    params = {f"p{i}": torch.randn(40, 50) for i in range(90)}
    params["large"] = torch.randn(BUCKET_ENTRIES)
    params |= {f"half{i}": torch.randn(5, i, dtype=torch.bfloat16) for i in range(3)}
    params["transposed"] = torch.randn(6, 7).T
    grads = tree.map(torch.randn_like, params)
    optimizer = AdamW(0.1)
    together = optimizer.update(grads, optimizer.init(params), params)
    for name, value in params.items():
        alone = optimizer.update(grads[name], optimizer.init(value), value)
        assert together[0][name].shape == value.shape
        assert torch.equal(together[0][name], alone[0])
        assert torch.equal(together[1].second_moment[name], alone[1].second_moment)


def test_bucket_sizes() -> None:
    leaves = [torch.zeros(n) for n in (10, BUCKET_ENTRIES, 20, BUCKET_ENTRIES // 2, 30)]
    leaves += [torch.zeros(BUCKET_ENTRIES // 2)]
    assert sorted(bucket_indices(leaves, ["a"] * 6)) == [[0, 2, 3, 4], [1], [5]]
    assert sorted(bucket_indices(leaves, ["a", "a", "b", None, "a", None])) == [[0, 4], [1], [2]]


@pytest.mark.parametrize("name", PAIRS)
def test_state_dtype(name) -> None:
    """bfloat16 parameters, float32 moments: the update is the float32 one, rounded once."""
    params = make_params(torch.bfloat16)
    grads = tree.map(torch.cos, params)
    optimizer = replace(PAIRS[name][0], state_dtype=torch.float32)
    state = optimizer.init(params)
    wide_params = tree.map(torch.Tensor.float, params)
    wide_grads = tree.map(torch.Tensor.float, grads)
    wide_state = optimizer.init(wide_params)
    for _ in range(3):
        new, new_state = optimizer.update(grads, state, params)
        wide, wide_new_state = optimizer.update(wide_grads, wide_state, wide_params)
        for leaf in params:
            assert new[leaf].dtype == torch.bfloat16
            assert torch.equal(new[leaf], wide[leaf].bfloat16())
        for moments, wide_moments in zip(new_state[1:], wide_new_state[1:], strict=True):
            assert (moments is None) == (wide_moments is None)
            for leaf in params if moments else ():
                assert moments[leaf].dtype == torch.float32
                assert torch.equal(moments[leaf], wide_moments[leaf])
        bars = optimizer.vjp(grads, state, params, params, state)
        wide_bars = optimizer.vjp(wide_grads, wide_state, wide_params, wide_params, wide_state)
        for leaf in params:
            assert torch.equal(bars.grads[leaf], wide_bars.grads[leaf].bfloat16())
            assert torch.equal(bars.params[leaf], wide_bars.params[leaf].bfloat16())
        for moments, wide_moments in zip(bars.state[1:], wide_bars.state[1:], strict=True):
            for leaf in params if moments else ():
                assert torch.equal(moments[leaf], wide_moments[leaf])
        state, params = new_state, new
        wide_state, wide_params = wide_new_state, tree.map(torch.Tensor.float, new)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_moments_of_16_bits(name) -> None:
    """bfloat16 by default follows the parameters; float16, in which eps is 0, is refused."""
    params = make_params(torch.bfloat16)
    optimizer = replace(PAIRS[name][0], eps=1e-8)
    assert optimizer.init(params).second_moment["scale"].dtype == torch.bfloat16
    halves = tree.map(torch.Tensor.half, params)
    with pytest.raises(ValueError, match=r"eps=1e-08 is lost in torch.float16.*state_dtype"):
        optimizer.init(halves)
    fitting = replace(optimizer, state_dtype=torch.float32)
    zeros = tree.zeros_like(halves)
    new, _ = fitting.update(zeros, fitting.init(halves), halves)
    assert bool(tree.allfinite(new))
    bars = fitting.vjp(zeros, fitting.init(halves), halves, tree.scale(1e-6, halves))
    assert bool(tree.allfinite(bars.params))


def test_clip_scale() -> None:
    assert clip_scale(torch.tensor(2.0), 1.0).item() == pytest.approx(0.5, rel=1e-6)
    assert clip_scale(torch.tensor(0.5), 1.0).item() == 1.0


def test_learning_rate_may_be_a_tensor_with_a_gradient() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    optimizer = SGD(lambda step: lr * 0.5**step)
    params = {"w": torch.ones(2, dtype=torch.float64)}
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.update({"w": torch.ones(2, dtype=torch.float64)}, state, params)
    params["w"].sum().backward()
    assert lr.grad.item() == pytest.approx(-3.0, rel=1e-15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(-0.1), r"SGD: lr must lie in \[0, inf\), got -0\.1"),
        (lambda: SGD(0.1, 1.0), r"SGD: momentum must lie in \[0, 1\), got 1\.0"),
        (lambda: SGD(0.1, nesterov=True), r"SGD: nesterov=True needs momentum in \(0, 1\)"),
        (lambda: Adam(0.1, (0.9, 1.0)), r"Adam: betas\[1\] must lie in \[0, 1\), got 1\.0"),
        (lambda: Adam(0.1, (-0.1, 0.9)), r"Adam: betas\[0\] must lie in \[0, 1\), got -0\.1"),
        (lambda: AdamW(0.1, eps=0.0), r"AdamW: eps must lie in \(0, inf\), got 0\.0"),
        (lambda: AdamW(0.1, weight_decay=-1), r"AdamW: weight_decay .* \[0, inf\), got -1"),
        (lambda: AdamW(0.1, max_norm=0.0), r"AdamW: max_norm must lie in \(0, inf\), got 0\.0"),
        (lambda: RMSProp(0.1, beta=1.5), r"RMSProp: beta must lie in \[0, 1\), got 1\.5"),
        (lambda: Adagrad(float("inf")), r"Adagrad: lr must lie in \[0, inf\), got inf"),
    ],
)
def test_errors_name_field_value_and_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_mismatched_gradients_are_refused() -> None:
    params = make_params()
    optimizer = SGD(0.1)
    state = optimizer.init(params)
    wrong = {**params, "layer.weight": params["layer.weight"].T}
    with pytest.raises(
        ValueError, match=r"'layer.weight': expected shape \(4, 3\), found \(3, 4\)"
    ):
        optimizer.update(wrong, state, params)
    with pytest.raises(ValueError, match="scale"):
        optimizer.update({"scale": params["scale"]}, state, params)


def test_mismatched_cotangents_are_refused() -> None:
    params = make_params()
    optimizer = AdamW(0.1)
    state = optimizer.init(params)
    wrong = {**params, "layer.bias": params["layer.bias"][:2]}
    for call in (
        lambda: optimizer.vjp(params, state, params, wrong),
        lambda: optimizer.grads_vjp(params, state, params, wrong),
        lambda: optimizer.predicted_grads_vjp(state, params, wrong),
    ):
        with pytest.raises(ValueError, match=r"cotangent of 'layer.bias': expected shape \(4,\)"):
            call()


def test_one_module_imports_torchopt() -> None:
    package = Path(rules.__file__).parent
    importing = [path.name for path in package.glob("*.py") if "torchopt" in _imports(path)]
    assert importing == ["rules.py"]


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}
