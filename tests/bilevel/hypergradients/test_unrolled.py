"""The unrolled hypergradient against numbers, closed forms, differences and other graphs."""

from __future__ import annotations

from dataclasses import replace

import optree
import pytest
import torch
import torchopt
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel import (
    SGD,
    Adam,
    AdamW,
    Auto,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Jvp,
    OneStep,
    Reverse,
    ReweightingProblem,
    Unrolled,
    tree,
)
from tests.bilevel import torchopt_reference as reference
from tests.bilevel.comparing import relative, same_bits
from tests.bilevel.problems import total_problem
from tests.bilevel.run_case import OPTIMIZERS, batches_of, run_case_window, warm
from tests.bilevel.run_window import run_window
from tests.bilevel.variants import cast, pick
from tests.bilevel.zoo import CASES, build
from tests.oracles import (
    REGRESSION,
    VALIDATION,
    WEIGHTS,
    lower_gradient,
    random_like,
    slope,
    upper_after_window,
)

STEPS = 3
CLIPS = {
    "unclipped": {},
    "clip held": {"max_norm": 0.05},
    "clip differentiated": {"max_norm": 0.05, "differentiate_clip": True},
}


# Known numbers and closed forms.


@pytest.mark.parametrize(
    "method",
    [Unrolled(), Unrolled(replay=2), Unrolled(product=Jvp()), Unrolled(replay="sqrt")],
    ids=str,
)
@pytest.mark.parametrize(
    ("optimizer", "start", "loss", "expected"),
    [
        (
            SGD(0.05),
            [0.0, 0.0],
            0.026972578388,
            [-0.002090156978, 0.000948993023, 0.005479872241, -0.019099260293],
        ),
        (
            SGD(0.05, 0.9),
            [0.0, 0.0],
            1.922680326602,
            [-0.0050212566, 0.171247401224, 0.722938797477, 1.389825936053],
        ),
        (
            Adam(0.1),
            [0.3, -0.2],
            0.161299858275,
            [3.7695975396e-03, 6.3671022539e-04, 4.7980925373e-03, -1.6114116053e-02],
        ),
        (
            AdamW(0.1, weight_decay=0.1),
            [0.3, -0.2],
            0.169904495210,
            [4.0505561184e-03, 6.1347992020e-04, 5.1477790015e-03, -1.7271860755e-02],
        ),
    ],
    ids=["gradient descent", "momentum", "adam", "adamw"],
)
def test_five_steps_of_the_regression(method, optimizer, start, loss, expected):
    """Computed elsewhere by complex steps; the last printed digit is what limits the comparison."""
    params = {"w": torch.tensor(start, dtype=torch.float64)}
    found = run_window(
        method,
        total_problem(0.5),
        optimizer,
        params,
        {"s": WEIGHTS},
        optimizer.init(params),
        [[REGRESSION]] * 5,
        VALIDATION,
    )
    assert abs(float(found.upper_loss) - loss) < 1e-12
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.hypergradient["s"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("truncation", [1, 2, 4, 5, None])
def test_gradient_descent_on_a_quadratic(truncation):
    """L = ½ w'Aw + x'Cw + a'w, F = ½ w'Qw + f'w + ½ x'Hx; K steps, the last T of them unrolled::

    dF/dx = H x − η C Σ_{j<T} (I − η A)^j (Q w_K + f)
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size, upper_size, count, lr = 4, 3, 5, 0.07
    a_half, q_half, h_half = randn(size, size), randn(size, size), randn(upper_size, upper_size)
    matrix = a_half @ a_half.T + torch.eye(size)
    quadratic, upper_quadratic = q_half @ q_half.T, h_half @ h_half.T
    cross, linear, upper_linear = randn(upper_size, size), randn(size), randn(size)
    x, start = randn(upper_size), randn(size)
    problem = BilevelProblem(
        lambda w, x, _: 0.5 * w @ matrix @ w + x @ cross @ w + linear @ w,
        lambda w, x, _: (0.5 * quadratic @ w + upper_linear) @ w + 0.5 * x @ upper_quadratic @ x,
    )
    optimizer = SGD(lr)
    found = run_window(
        Unrolled(truncation),
        problem,
        optimizer,
        start,
        x,
        optimizer.init(start),
        [[None]] * count,
        0,
    )
    w = start
    for _ in range(count):
        w = w - lr * (matrix @ w + cross.T @ x + linear)
    v, total = quadratic @ w + upper_linear, torch.zeros(size, dtype=torch.float64)
    for _ in range(count if truncation is None else truncation):
        total, v = total + v, v - lr * matrix @ v
    torch.testing.assert_close(found.lower_params, w, rtol=1e-12, atol=0)
    expected = upper_quadratic @ x - lr * cross @ total
    torch.testing.assert_close(found.hypergradient, expected, rtol=1e-9, atol=0)


# Differences through the whole window.


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_against_differences(optimizer, clip):
    case, optimizer = build("mlp"), replace(optimizer, **clip)
    found = run_case_window(case, optimizer, Unrolled())
    if clip:
        assert all(passed.grad_norm > 0.1 for passed in found.passes)
    assert_is_the_slope(case, optimizer, found.hypergradient)


@pytest.mark.parametrize("truncation", [1, 2])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_truncation_holds_the_point_before_its_steps(truncation, clip):
    case, optimizer = build("mlp"), replace(OPTIMIZERS["adamw"], **clip)
    found = run_case_window(case, optimizer, Unrolled(truncation)).hypergradient
    whole = run_case_window(case, optimizer, Unrolled()).hypergradient
    assert relative(found, whole) > 1e-3
    assert_is_the_slope(case, optimizer, found, truncation)


def assert_is_the_slope(case, optimizer, hypergradient, truncation=STEPS, tolerance=1e-6):
    params, state = warm(case, optimizer)
    torch.manual_seed(11)
    function = upper_after_window(
        case.problem,
        optimizer,
        params,
        state,
        batches_of(case),
        case.upper_batch,
        at=case.upper_params,
        unrolled=truncation,
    )
    for seed in (0, 1):
        direction = random_like(case.upper_params, seed)
        expected = slope(function, case.upper_params, direction)
        found = float(tree.vdot(hypergradient, direction))
        assert abs(found - expected) <= tolerance * max(abs(expected), 1e-3)


# A graph of all steps, written by hand.


def by_graph(case, lr, point, steps, *, betas=None, eps=0.0, momentum=0.0, batches=None):
    """The hypergradient by double backward through the last steps, in plain torch operations."""
    params, state = point
    params, count = dict(params), int(state.steps)
    moments = {
        name: [
            None if moment is None else moment[name]
            for moment in (state.first_moment, state.second_moment)
        ]
        for name in params
    }
    upper = {name: leaf.detach().requires_grad_() for name, leaf in case.upper_params.items()}
    torch.manual_seed(11)
    batches = batches_of(case) if batches is None else batches
    with sdpa_kernel(SDPBackend.MATH):
        for index, step in enumerate(batches):
            recorded = index >= len(batches) - steps
            random = torch.get_rng_state()
            params = {
                name: leaf if recorded and leaf.requires_grad else leaf.detach().requires_grad_()
                for name, leaf in params.items()
            }
            sizes = [len(batch["labels"]) for batch in step]
            losses = [case.problem.lower_loss(params, upper, batch) for batch in step]
            loss = sum(n * one for n, one in zip(sizes, losses, strict=True)) / sum(sizes)
            found = torch.autograd.grad(
                loss, list(params.values()), allow_unused=True, create_graph=recorded
            )
            new = {}
            for (name, leaf), g in zip(params.items(), found, strict=True):
                first, second = moments[name]
                if g is None:
                    new[name] = leaf
                elif betas is None:
                    first = g if first is None else momentum * first + g
                    new[name], moments[name] = leaf - lr * first, [first, None]
                else:
                    first = betas[0] * first + (1 - betas[0]) * g
                    second = betas[1] * second + (1 - betas[1]) * g**2
                    hat = first / (1 - betas[0] ** (count + index + 1))
                    root = (second / (1 - betas[1] ** (count + index + 1))).sqrt()
                    new[name], moments[name] = leaf - lr * hat / (root + eps), [first, second]
                if momentum == 0.0 and betas is None:
                    moments[name] = [None, None]
            params = new
            if not recorded:
                moments = {
                    name: [None if m is None else m.detach() for m in pair]
                    for name, pair in moments.items()
                }
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        value = case.problem.upper_loss(params, upper, case.upper_batch)
        torch.set_rng_state(after)
        grads = torch.autograd.grad(value, list(upper.values()), allow_unused=True)
    return dict(zip(upper, grads, strict=True))


GRAPHS = {
    "sgd": (SGD(0.3), {"lr": 0.3}),
    "momentum": (SGD(0.3, 0.8), {"lr": 0.3, "momentum": 0.8}),
    "adam": (Adam(0.05, (0.8, 0.9), 1e-3), {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}),
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", CASES)
def test_every_layer_against_a_graph_of_all_steps(name, kind):
    """Attention, RMSNorm, SiLU, LayerNorm, GELU, convolutions, embeddings, tied and frozen
    parameters, dropout; by forward over reverse, double backward and differences."""
    case, (optimizer, constants) = build(name), GRAPHS[kind]
    point = warm(case, optimizer)
    expected = by_graph(case, point=point, steps=STEPS, **constants)
    found = run_case_window(case, optimizer, Unrolled(), point=point).hypergradient
    assert relative(found, expected) <= 1e-10
    if kind == "adam":
        found = run_case_window(case, optimizer, Unrolled(product=Jvp()), point=point).hypergradient
        assert relative(found, expected) <= 1e-10
        difference = Unrolled(product=CentralDifference())
        assert (
            relative(
                run_case_window(case, optimizer, difference, point=point).hypergradient, expected
            )
            <= 1e-6
        )
        truncated = by_graph(case, point=point, steps=2, **constants)
        found = run_case_window(case, optimizer, Unrolled(2, replay=1), point=point).hypergradient
        assert relative(found, truncated) <= 1e-10


@pytest.mark.parametrize("detach_features", [False, True])
@pytest.mark.parametrize(
    ("product", "limit"), [(Jvp(), 1e-10), (Reverse(), 1e-10), (CentralDifference(), 1e-6)]
)
def test_weights_of_features(product, limit, detach_features):
    """A weight network on the losses: they are data, or a path to θ."""

    def weights(upper, batch, features):
        return torch.sigmoid(upper["scale"] * features["losses"] + upper["table"][batch["index"]])

    case = build("encoder")
    problem = replace(case.problem, weights=weights, detach_features=detach_features)
    case = replace(case, problem=problem)
    optimizer, constants = GRAPHS["adam"]
    point = warm(case, optimizer)
    expected = by_graph(case, point=point, steps=STEPS, **constants)
    found = run_case_window(case, optimizer, Unrolled(product=product), point=point).hypergradient
    assert relative(found, expected) <= limit


@pytest.mark.parametrize("name", reference.OPTIMIZERS)
def test_three_steps_through_torchopt(name):
    """From warm moments: TorchOpt's own derivative is NaN where a gradient is 0, and only there."""
    ours, theirs = reference.OPTIMIZERS[name]
    theta, phi, train, meta = reference.data()
    problem = reference.problem()
    transformation, raw = theirs(), phi["raw"].clone().requires_grad_()
    params = theta
    # TorchOpt computes Adam's bias correction in the dtype of its counts, float32 for integers.
    moments = optree.tree_map(
        lambda leaf: leaf if leaf.is_floating_point() else leaf.double(), transformation.init(theta)
    )
    state, point = ours.init(theta), theta
    for step in range(3 + STEPS):
        recorded = step >= 3
        leaves = params if recorded else {k: v.detach() for k, v in params.items()}
        leaves = {k: v if v.requires_grad else v.requires_grad_() for k, v in leaves.items()}
        loss = problem.lower_loss(leaves, {"raw": raw}, train)
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=recorded)
        grads = dict(zip(leaves, found, strict=True))
        if not recorded:
            with torch.no_grad():
                point, state = ours.update(grads, state, point)
        updates, moments = transformation.update(grads, moments, params=leaves, inplace=False)
        params = torchopt.apply_updates(leaves, updates, inplace=False)
        if not recorded:
            moments = optree.tree_map(torch.Tensor.detach, moments)
    (expected,) = torch.autograd.grad(problem.upper_loss(params, None, meta), raw)
    result = run_window(Unrolled(), problem, ours, point, phi, state, [[train]] * STEPS, meta)
    assert relative(result.hypergradient["raw"], expected) <= 1e-10
    params = tree.map(torch.Tensor.detach, params)
    assert relative(result.lower_params, params) <= 1e-12


# The same numbers by other ways through the code.


@pytest.mark.parametrize("name", ["adamw", "nesterov"])
def test_what_is_remembered_does_not_change_a_bit(name):
    optimizer = OPTIMIZERS[name]
    case = cast(build("dropout"), torch.float32)
    case = replace(case, upper_params=tree.map(torch.Tensor.float, case.upper_params))
    batches = batches_of(case) * 3
    first = run_case_window(case, optimizer, Unrolled(), batches=batches)
    for replay in (1, 2, 3, 5, 50, "sqrt"):
        for store in ("device", "host"):
            other = run_case_window(
                case, optimizer, Unrolled(replay=replay, store=store), batches=batches
            )
            assert same_bits(other.hypergradient, first.hypergradient)
            assert same_bits(other.lower_params, first.lower_params)
            assert same_bits(other.optimizer_state, first.optimizer_state)
    other = run_case_window(case, optimizer, Unrolled(store="host"), batches=batches)
    assert same_bits(other.hypergradient, first.hypergradient)


@pytest.mark.parametrize("name", ["mlp", "dropout", "encoder"])
def test_one_step_is_one_step(name):
    """A window of one, or a truncation to one, is `OneStep` bit for bit."""
    case, optimizer = cast(build(name), torch.float32), OPTIMIZERS["adamw"]
    for method, batches in ((Unrolled(), batches_of(case)[:1]), (Unrolled(1), batches_of(case))):
        for product in (Jvp(), Reverse()):
            ours = run_case_window(
                case, optimizer, replace(method, product=product), batches=batches
            )
            other = run_case_window(case, optimizer, OneStep(product), batches=batches)
            assert same_bits(ours.hypergradient, other.hypergradient)
            assert same_bits(ours.lower_params, other.lower_params)
            assert torch.equal(ours.upper_loss, other.upper_loss)


@pytest.mark.parametrize("name", ["attention", "tiles"])
def test_micro_batches_are_the_batch(name):
    case, optimizer = build(name), OPTIMIZERS["adam"]
    pieces = [pick(case.batch, [0, 1, 2]), pick(case.batch, [3, 4])]
    together = run_case_window(case, optimizer, Unrolled(), batches=[[case.batch]] * STEPS)
    apart = run_case_window(case, optimizer, Unrolled(), batches=[pieces] * STEPS)
    assert relative(apart.hypergradient, together.hypergradient) <= 1e-11
    assert relative(apart.lower_params, together.lower_params) <= 1e-12


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["tuple", "list", "namespace", "encoding"])
def test_batches_of_any_kind(kind):
    """The library never looks into a batch."""
    case, optimizer = build("mlp"), OPTIMIZERS["adam"]
    expected = run_case_window(case, optimizer, Unrolled())

    def wrap(batch):
        inputs, labels, index = batch["inputs"], batch["labels"], batch["index"]
        if kind == "tuple":
            return inputs, labels, index
        if kind == "list":
            return [inputs, labels, index]
        if kind == "namespace":
            return type("Batch", (), batch)()
        from transformers import BatchEncoding

        return BatchEncoding({"x": inputs["x"], "labels": labels, "index": index})

    def unwrap(batch):
        if kind == "encoding":
            inputs = {"x": batch["x"]}
            return {"inputs": inputs, "labels": batch["labels"], "index": batch["index"]}
        found = vars(type(batch)) if kind == "namespace" else dict(zip(KEYS, batch, strict=True))
        return {key: found[key] for key in KEYS}

    problem = ReweightingProblem(
        lambda lower, batch: case.problem.per_example_loss(lower, unwrap(batch)),
        lambda upper, batch, features: case.problem.weights(upper, unwrap(batch), features),
        lambda lower, upper, batch: case.problem.upper_loss(lower, upper, unwrap(batch)),
    )
    batches = [[wrap(batch) for batch in step] for step in batches_of(case)]
    wrapped = replace(case, problem=problem, upper_batch=wrap(case.upper_batch))
    found = run_case_window(wrapped, optimizer, Unrolled(replay=1), batches=batches)
    assert same_bits(found.hypergradient, expected.hypergradient)


KEYS = ("inputs", "labels", "index")


def test_batch_normalisation_in_training_mode_needs_copies_of_its_buffers():
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    before = {name: leaf.clone() for name, leaf in module.named_buffers()}
    x, optimizer = torch.randn(5, 4, dtype=torch.float64), SGD(0.1, 0.9)

    def problem(copied):
        def lower_loss(lower, upper, batch):
            buffers = {name: leaf.clone() for name, leaf in module.named_buffers()}
            state = {**lower, **buffers} if copied else lower
            return (upper * functional_call(module, state, (batch,)).squeeze(1).square()).mean()

        return BilevelProblem(lower_loss, lower_loss)

    def run(copied, product):
        ones = torch.ones(5, dtype=torch.float64)
        state = optimizer.init(params)
        return run_window(
            Unrolled(product=product), problem(copied), optimizer, params, ones, state, [[x]] * 3, x
        ).hypergradient

    assert relative(run(True, Jvp()), run(True, Reverse())) <= 1e-10
    assert all(torch.equal(leaf, before[name]) for name, leaf in module.named_buffers())
    with pytest.raises(RuntimeError, match=r"bilevel.functional\(module\)"):
        run(False, Jvp())


# Zeros, cold states and precision.


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS.values())[3:], ids=list(OPTIMIZERS)[3:])
def test_zero_gradients_and_cold_states_are_finite_and_exact(optimizer):
    """Dead units, unused rows and parameters; TorchOpt and higher give NaN there."""
    case = build("mlp")
    case.params["layers.0.bias"][:] = 0.0
    case.params["head.weight"][:, 0] = 0.0
    case.params["gain"][0] = 0.0
    # Away from the kink: Adam's step is ± lr within eps of a gradient of 0.
    optimizer = replace(optimizer, eps=1e-1)
    cold = case.params, optimizer.init(case.params)
    found = run_case_window(case, optimizer, Unrolled(), point=cold)
    assert tree.allfinite(found.hypergradient)
    grads = lower_gradient(case.problem, case.params, case.upper_params, case.batch)
    assert any(bool((leaf == 0.0).any()) for leaf in tree.leaves(grads))
    torch.manual_seed(11)
    function = upper_after_window(
        case.problem,
        optimizer,
        *cold,
        batches_of(case),
        case.upper_batch,
        at=case.upper_params,
        unrolled=STEPS,
    )
    direction = random_like(case.upper_params, 0)
    expected = slope(function, case.upper_params, direction)
    assert abs(float(tree.vdot(found.hypergradient, direction)) / expected - 1.0) <= 1e-6
    tiny = replace(optimizer, eps=1e-8)
    assert tree.allfinite(run_case_window(case, tiny, Unrolled(), point=cold).hypergradient)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize("name", ["mlp", "attention", "encoder", "vision"])
def test_precision(name, dtype, limit):
    """Against float64 from the same numbers; moments and upper level in float32."""

    def cast(value, to):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(to) if floating else value

    def at(to):
        """The problem rounded to `dtype`, in the precision `to`."""
        rounded = [cast_all(cast_all(tree_, dtype), to) for tree_ in (params, *batches)]
        wide = torch.promote_types(to, torch.float32)
        moments = cast_all(cast_all(state, torch.float32), wide)
        upper = cast_all(cast_all(case.upper_params, torch.float32), wide)
        found = replace(case, upper_params=upper, batch=rounded[1], upper_batch=rounded[2])
        optimizer = replace(OPTIMIZERS["adamw"], state_dtype=wide)
        return run_case_window(
            found, optimizer, Unrolled(), point=(rounded[0], moments)
        ).hypergradient

    def cast_all(values, to):
        return tree.map(lambda leaf: cast(leaf, to), values)

    case = build(name)
    params, state = warm(case, OPTIMIZERS["adamw"])
    batches = case.batch, case.upper_batch
    found, expected = cast_all(at(dtype), torch.float64), at(torch.float64)
    assert relative(found, expected) <= limit


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["dropout", "encoder"])
def test_auto_is_jvp_at_the_first_step_and_reverse_at_the_others(name):
    case, optimizer = build(name), OPTIMIZERS["adamw"]
    for steps, product in ((1, Jvp()), (STEPS, Reverse())):
        batches = batches_of(case)[:steps]
        ours = run_case_window(case, optimizer, Unrolled(), batches=batches)
        other = run_case_window(case, optimizer, Unrolled(product=product), batches=batches)
        assert same_bits(ours.lower_params, other.lower_params)
        assert same_bits(ours.hypergradient, other.hypergradient) == (steps == 1)
        assert relative(ours.hypergradient, other.hypergradient) <= 1e-12


class ForwardOnly(torch.autograd.Function):
    """tanh with a derivative in forward mode, whose backward pass has none."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, bar):
        (y,) = ctx.saved_tensors
        return bar * (1.0 - y * y)

    @staticmethod
    def jvp(ctx, tangent):
        (y,) = ctx.saved_tensors
        return tangent * (1.0 - y * y)


def with_tanh(tanh, method, steps):
    torch.manual_seed(0)
    x, theta = torch.randn(5, 3).double(), {"w": torch.randn(3, 2).double()}
    problem = BilevelProblem(
        lambda t, p, b: (p["a"].exp() * tanh(b @ t["w"]).square()).mean(),
        lambda t, p, b: (b @ t["w"]).cos().mean(),
    )
    solver = BilevelSolver(problem, SGD(0.1), SGD(1.0), method, unroll_steps=steps)
    state = solver.init(theta, {"a": torch.zeros(2).double()})
    return solver.window(state, [[x]] * steps, x)[0].upper_params["a"]


def test_a_small_step_without_double_backward_is_left_to_forward_mode():
    """Through one step no second derivative in θ is needed."""
    found = with_tanh(ForwardOnly.apply, Unrolled(), 1)
    torch.testing.assert_close(found, with_tanh(torch.tanh, Unrolled(), 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("product", [Auto(), Jvp(), Reverse()], ids=str)
def test_forward_mode_over_a_backward_pass_without_derivative_is_refused(product):
    """torch's forward mode takes it for a constant: 4 % of this hypergradient were missing."""
    with pytest.raises(RuntimeError, match="marked once_differentiable"):
        with_tanh(ForwardOnly.apply, Unrolled(product=product), 3)
    with pytest.warns(UserWarning, match=r"custom autograd\.Function"):
        found = with_tanh(ForwardOnly.apply, Unrolled(product=CentralDifference()), 3)
    expected = with_tanh(torch.tanh, Unrolled(), 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
