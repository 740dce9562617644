"""The closed-form derivative of the update: autograd, finite differences, golden numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bilevel import tree
from bilevel.optimizers.base import OptimizerState
from bilevel.optimizers.optimizers import SGD, Adagrad, Adam, AdamW, RMSProp
from bilevel.optimizers.variants import AdaDelta, Adamax, NAdam, RAdam
from tests.bilevel.optimizers.draws import CLIPS, EARLIER_STEPS, OPTIMIZERS, draw, warm_state


def reference(optimizer, grads, first, second, params, steps, scale):
    """The update again, from the textbook, in operations that autograd differentiates.

    `scale` is the clip scale to hold constant, or None to compute it from the gradients.
    """
    if optimizer.max_norm is None:
        scale = 1.0
    elif scale is None:
        norm = torch.sqrt(sum(g.square().sum() for g in grads.values()))
        scale = torch.clamp(optimizer.max_norm / (norm + 1e-6), max=1.0)
    new_params, new_first, new_second = {}, {}, {}
    for name, p in params.items():
        g, decay, lr = grads[name] * scale, optimizer.weight_decay, optimizer.lr
        if optimizer.group is not None:
            decay, lr = decay[optimizer.group(name)], lr[optimizer.group(name)]
        m, s = first.get(name), second.get(name)
        if optimizer.decay_mask is not None:
            decay = decay if optimizer.decay_mask(name) else 0.0
        if not isinstance(optimizer, AdamW):
            g = g + decay * p
        if isinstance(optimizer, SGD):
            u = g
            if m is not None:
                new_first[name] = m = optimizer.momentum * m + g
                u = g + optimizer.momentum * m if optimizer.nesterov else m
        elif isinstance(optimizer, NAdam):
            b1, b2 = optimizer.betas
            new_first[name] = m = b1 * m + (1 - b1) * g
            new_second[name] = s = b2 * s + (1 - b2) * g**2
            mus = [b1 * (1 - 0.5 * 0.96 ** (0.3 * t)) for t in range(1, steps + 2)]
            here, next_ = math.prod(mus[:-1]), math.prod(mus)
            m_hat = mus[-1] * m / (1 - next_) + (1 - mus[-2]) * g / (1 - here)
            u = m_hat / (torch.sqrt(s / (1 - b2**steps)) + optimizer.eps)
        elif isinstance(optimizer, RAdam):
            b1, b2 = optimizer.betas
            new_first[name] = m = b1 * m + (1 - b1) * g
            new_second[name] = s = b2 * s + (1 - b2) * g**2
            u = m / (1 - b1**steps)
            end = 2 / (1 - b2) - 1
            rho = end - 2 * steps * b2**steps / (1 - b2**steps)
            if rho > 5:
                r = math.sqrt((rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho))
                u = r * u * math.sqrt(1 - b2**steps) / (torch.sqrt(s) + optimizer.eps)
        elif isinstance(optimizer, Adamax):
            b1, b2 = optimizer.betas
            new_first[name] = m = b1 * m + (1 - b1) * g
            new_second[name] = s = torch.maximum(b2 * s, g.abs() + optimizer.eps)
            u = m / ((1 - b1**steps) * s)
        elif isinstance(optimizer, AdaDelta):
            rho, eps = optimizer.rho, optimizer.eps
            new_second[name] = s = rho * s + (1 - rho) * g**2
            u = torch.sqrt(m + eps) / torch.sqrt(s + eps) * g
            new_first[name] = rho * m + (1 - rho) * u**2
        elif isinstance(optimizer, Adam):
            b1, b2 = optimizer.betas
            new_first[name] = m = b1 * m + (1 - b1) * g
            new_second[name] = s = b2 * s + (1 - b2) * g**2
            u = (m / (1 - b1**steps)) / (torch.sqrt(s / (1 - b2**steps)) + optimizer.eps)
            u = u + decay * p if isinstance(optimizer, AdamW) else u
        elif isinstance(optimizer, RMSProp):
            new_second[name] = s = optimizer.beta * s + (1 - optimizer.beta) * g**2
            u = g / (torch.sqrt(s) + optimizer.eps)
        else:
            new_second[name] = s = s + g**2
            u = g / (torch.sqrt(s) + optimizer.eps)
        new_params[name] = p - lr * u
    return new_params, new_first, new_second


def moments(state: OptimizerState) -> tuple[dict, dict]:
    """The moments, an absent one as an empty tree (torch.func takes no None)."""
    return state.first_moment or {}, state.second_moment or {}


def held_scale(optimizer, grads) -> float | None:
    if optimizer.max_norm is None or optimizer.differentiate_clip:
        return None
    return min(1.0, optimizer.max_norm / (tree.norm(grads).item() + 1e-6))


def close(found, expected, *, rtol=1e-12, atol=1e-14) -> None:
    assert tree.names(found) == tree.names(expected)
    for name, one, other in zip(
        tree.names(found), tree.leaves(found), tree.leaves(expected), strict=True
    ):
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("zero_grads", [False, True])
def test_vjp_is_autograds_through_a_reference(name, clip, zero_grads) -> None:
    optimizer = replace(OPTIMIZERS[name], **CLIPS[clip])
    grads, params, params_bar = draw(1), draw(2), draw(3)
    if zero_grads:
        grads["a"] = torch.zeros_like(grads["a"])
    state = warm_state(optimizer, steps=EARLIER_STEPS.get(name, 4))
    state_bar = warm_state(optimizer, seed=20)
    scale = held_scale(optimizer, grads)
    number = int(state.steps) + 1

    outputs, pull_back = torch.func.vjp(
        lambda g, m, s, p: reference(optimizer, g, m, s, p, number, scale),
        grads,
        *moments(state),
        params,
    )
    new_params, new_state = optimizer.update(grads, state, params)
    close((new_params, *moments(new_state)), outputs)

    expected = pull_back((params_bar, *moments(state_bar)))
    found = optimizer.vjp(grads, state, params, params_bar, state_bar)
    close((found.grads, *moments(found.state), found.params), expected)
    assert found.state.steps.item() == 0
    assert not any(leaf.requires_grad for leaf in tree.leaves(found))

    expected = pull_back((params_bar, *tree.zeros_like(moments(state_bar))))
    found = optimizer.vjp(grads, state, params, params_bar)
    close((found.grads, *moments(found.state), found.params), expected)
    close(optimizer.grads_vjp(grads, state, params, params_bar), expected[0])


def directional(optimizer, point, direction, params_bar, state_bar, h) -> float:
    """Central difference of ⟨bars, update(point)⟩ along `direction`."""

    def value(step: float) -> float:
        grads, state, params = tree.axpy(step, direction, point)
        state = state._replace(steps=point[1].steps)
        new_params, new_state = optimizer.update(grads, state, params)
        total = tree.vdot(params_bar, new_params)
        return (total + tree.vdot(state_bar[1:], new_state[1:])).item()

    return (value(h) - value(-h)) / (2 * h)


@pytest.mark.parametrize("clip", ["unclipped", "inactive", "differentiated"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("zero_grads", [False, True])
def test_vjp_is_a_central_difference(name, clip, zero_grads) -> None:
    """Along every coordinate of the gradient, and random directions of everything."""
    optimizer = replace(OPTIMIZERS[name], **CLIPS[clip])
    grads, params, params_bar = draw(1), draw(2), draw(3)
    if zero_grads:
        grads["a"] = torch.zeros_like(grads["a"])
    state, state_bar = warm_state(optimizer), warm_state(optimizer, seed=20)
    found = optimizer.vjp(grads, state, params, params_bar, state_bar)
    point = (grads, state, params)
    still = tree.map(torch.zeros_like, point)
    directions = []
    for leaf_name, leaf in grads.items():
        for index in range(leaf.numel()):
            unit = torch.zeros(leaf.numel(), dtype=torch.float64)
            unit[index] = 1.0
            direction = {**still[0], leaf_name: unit.reshape(leaf.shape)}
            directions.append((direction, *still[1:]))
    for seed in range(30, 35):
        moments = warm_state(optimizer, seed)._replace(steps=still[1].steps)
        directions.append((draw(seed), moments, draw(seed + 100)))
    for direction in directions:
        expected = directional(optimizer, point, direction, params_bar, state_bar, 1e-5)
        assert tree.vdot(tuple(found), direction).item() == pytest.approx(
            expected, rel=1e-7, abs=1e-9
        )


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "adagrad"])
def test_zero_gradient_from_a_cold_state(name) -> None:
    """d/dg [g/(|g| + eps)] = 1/eps at 0: both the formula and the limit of differences.

    The difference quotient is 1/(h + eps), so 2 q(h) − q(2h) has error O(h²).
    """
    optimizer = replace(OPTIMIZERS[name], weight_decay=0.0)
    params, params_bar = tree.zeros_like(draw(0)), draw(3)
    grads, state = tree.zeros_like(params), optimizer.init(params)
    found = optimizer.vjp(grads, state, params, params_bar)
    close(found.grads, tree.scale(-optimizer.lr / optimizer.eps, params_bar), rtol=1e-13)
    close(optimizer.grads_vjp(grads, state, params, params_bar), found.grads, rtol=1e-15, atol=0)
    close(found.params, params_bar)
    assert tree.allfinite(found).item()
    still = tree.map(torch.zeros_like, (grads, state, params))
    direction = (draw(5), *still[1:])

    def quotient(h: float) -> float:
        return directional(optimizer, (grads, state, params), direction, params_bar, state, h)

    h = 1e-6
    expected = 2 * quotient(h) - quotient(2 * h)
    assert tree.vdot(found.grads, direction[0]).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    ["adam", "adamw", "rmsprop", "adagrad", "nadam", "radam-plain", "adamax", "adadelta"],
)
def test_chained_steps_with_zero_gradients_from_a_cold_state(name) -> None:
    """Three steps, all gradients 0: the zero taken for the undefined derivative loses nothing."""
    optimizer = replace(OPTIMIZERS[name], weight_decay=0.0)
    start, params_bar, direction = tree.zeros_like(draw(0)), draw(3), draw(5)
    zeros = tree.zeros_like(start)

    def final(first_grads, second_grads):
        params, state, tape = start, optimizer.init(start), []
        for grads in (first_grads, second_grads, zeros):
            tape.append((grads, state, params))
            params, state = optimizer.update(grads, state, params)
        return params, tape

    _, tape = final(zeros, zeros)
    bar, state_bar, along = params_bar, None, 0.0
    for step in (2, 1, 0):
        bars = optimizer.vjp(*tape[step], bar, state_bar)
        bar, state_bar = bars.params, bars.state
        if step < 2:
            along += (1.0 + step) * tree.vdot(bars.grads, direction).item()

    def quotient(h: float) -> float:
        forward, _ = final(tree.scale(h, direction), tree.scale(2 * h, direction))
        backward, _ = final(tree.scale(-h, direction), tree.scale(-2 * h, direction))
        return (tree.vdot(params_bar, tree.axpy(-1.0, backward, forward)) / (2 * h)).item()

    h = 1e-6
    assert along == pytest.approx(2 * quotient(h) - quotient(2 * h), rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cold_state_with_some_zero_gradients(name) -> None:
    """Entries do not disturb one another; float32 with the default eps stays finite."""
    optimizer = OPTIMIZERS[name]
    params, params_bar, grads = draw(2), draw(3), draw(1)
    grads["b"][1:3] = 0.0
    state = optimizer.init(params)
    found = optimizer.vjp(grads, state, params, params_bar)
    for index in range(4):
        g, p, p_bar = ({"b": column["b"][index]} for column in (grads, params, params_bar))
        alone = optimizer.grads_vjp(g, optimizer.init(p), p, p_bar)
        torch.testing.assert_close(found.grads["b"][index], alone["b"], rtol=1e-13, atol=0)
    floats = tree.map(torch.Tensor.float, (grads, params, params_bar))
    adaptive = Adam, AdamW, RMSProp, Adagrad, NAdam, RAdam, Adamax, AdaDelta
    for plain in (kind(1e-3) for kind in adaptive):
        tiny = tree.scale(1e-30, floats[0])
        for gradient in (floats[0], tiny):
            bars = plain.vjp(gradient, plain.init(floats[1]), floats[1], floats[2])
            assert tree.allfinite(bars).item()


def test_cold_adam_is_sign_descent_so_its_derivative_is_nearly_zero() -> None:
    optimizer = Adam(0.1)
    params = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    ones = tree.map(torch.ones_like, params)
    bars = optimizer.grads_vjp(params, optimizer.init(params), params, ones)
    expected = [-0.1 * 1e-8 / (abs(g) + 1e-8) ** 2 for g in (1.0, 2.0)]
    assert bars["w"].tolist() == pytest.approx(expected, rel=1e-6)


def test_exact_clip_derivative_of_a_single_scaled_gradient_is_zero() -> None:
    """θ' does not change when one clipped gradient is scaled; the held scale says it does."""
    params, grads, params_bar = draw(2), draw(1), draw(3)
    exact = SGD(0.1, max_norm=0.5, differentiate_clip=True)
    held = replace(exact, differentiate_clip=False)
    state = exact.init(params)
    along = tree.vdot(exact.grads_vjp(grads, state, params, params_bar), grads).item()
    scale = 0.5 / (tree.norm(grads).item() + 1e-6)
    unclipped = -0.1 * tree.vdot(grads, params_bar).item()
    assert abs(along) < 1e-6 * abs(unclipped)
    assert tree.vdot(held.grads_vjp(grads, state, params, params_bar), grads).item() == (
        pytest.approx(scale * unclipped, rel=1e-12)
    )


@pytest.mark.parametrize("differentiate", [False, True])
def test_all_gradients_zero_under_a_clip(differentiate) -> None:
    params, params_bar = draw(2), draw(3)
    optimizer = AdamW(0.1, max_norm=1e-7, differentiate_clip=differentiate)
    bars = optimizer.vjp(tree.zeros_like(params), optimizer.init(params), params, params_bar)
    assert tree.allfinite(bars).item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_none_leaves(name) -> None:
    """Frozen leaves pass cotangents through; a None cotangent is zero."""
    optimizer = replace(OPTIMIZERS[name], max_norm=0.7, differentiate_clip=True)
    grads, params, params_bar = draw(1), draw(2), draw(3)
    state, state_bar = warm_state(optimizer), warm_state(optimizer, seed=20)
    frozen = {**grads, "b": None}
    found = optimizer.vjp(frozen, state, params, params_bar, state_bar)
    assert found.grads["b"] is None
    assert torch.equal(found.params["b"], params_bar["b"])
    for moment, given in zip(found.state[1:], state_bar[1:], strict=True):
        assert moment is given is None or torch.equal(moment["b"], given["b"])
    rest = {name: params[name] for name in "ac"}
    rest_state = OptimizerState(state.steps, *(m and {k: m[k] for k in "ac"} for m in state[1:]))
    alone = optimizer.vjp(
        {k: grads[k] for k in "ac"}, rest_state, rest, {k: params_bar[k] for k in "ac"}
    )
    without = optimizer.vjp(frozen, state, params, params_bar)
    close({k: without.grads[k] for k in "ac"}, alone.grads)
    zeroed = {**params_bar, "a": torch.zeros_like(params_bar["a"])}
    missing = {**params_bar, "a": None}
    close(
        optimizer.grads_vjp(grads, state, params, missing),
        optimizer.grads_vjp(grads, state, params, zeroed),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_prediction_is_exact_for_sgd(name) -> None:
    optimizer = OPTIMIZERS[name]
    params, params_bar = draw(2), draw(3)
    state = warm_state(optimizer)
    predicted = optimizer.predicted_grads_vjp(state, params, params_bar)
    close(predicted, optimizer.grads_vjp(draw(1), state, params, params_bar))


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "adagrad"])
def test_prediction_of_the_adaptive_rules(name) -> None:
    optimizer = OPTIMIZERS[name]
    params, params_bar = draw(2), draw(3)
    params_bar["c"] = None
    cold = optimizer.predicted_grads_vjp(optimizer.init(params), params, params_bar)
    close(cold, tree.scale(-optimizer.lr, params_bar))

    state = warm_state(optimizer)
    state.second_moment["b"][0] = 0.0
    found = optimizer.predicted_grads_vjp(state, params, params_bar)
    b1, b2, c1, c2 = 0.0, 1.0, 1.0, 1.0
    if isinstance(optimizer, Adam):
        b1, b2 = optimizer.betas
        c1, c2 = 1 - b1**5, 1 - b2**4
    for leaf in "ab":
        gain = (1 - b1) / c1 / ((state.second_moment[leaf] / c2).sqrt() + optimizer.eps)
        if leaf == "b":
            gain[0] = 1.0
        torch.testing.assert_close(
            found[leaf], -optimizer.lr * gain * params_bar[leaf], rtol=1e-13, atol=0
        )
    assert found["c"] is None


def test_prediction_of_the_variants() -> None:
    """The factor of −lr v with the gradient's own square left out, from each class's equation."""
    params, params_bar = draw(2), draw(3)
    nadam, radam = OPTIMIZERS["nadam"], OPTIMIZERS["radam-rectified"]
    adamax, adadelta = OPTIMIZERS["adamax"], OPTIMIZERS["adadelta"]
    mu = [0.8 * (1 - 0.5 * 0.96 ** (0.3 * t)) for t in range(1, 7)]
    here, next_ = math.prod(mu[:5]), math.prod(mu)
    rho, end = 39 - 20 * 0.95**10 / (1 - 0.95**10), 39.0
    r = math.sqrt((rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho))
    factors = {
        nadam: lambda m, s: (
            (mu[5] * 0.2 / (1 - next_) + (1 - mu[4]) / (1 - here))
            / ((s / (1 - 0.95**4)).sqrt() + 1e-2)
        ),
        adamax: lambda m, s: 0.2 / (1 - 0.8**5) / s,
        adadelta: lambda m, s: ((m + 1e-2) / (s + 1e-2)).sqrt(),
    }
    for optimizer, factor in factors.items():
        state = warm_state(optimizer)
        found = optimizer.predicted_grads_vjp(state, params, params_bar)
        close(
            found,
            tree.map(
                lambda m, s, v, factor=factor: -0.1 * factor(m, s) * v,
                state.first_moment,
                state.second_moment,
                params_bar,
            ),
        )
    plain = OPTIMIZERS["radam-plain"].predicted_grads_vjp(warm_state(radam), params, params_bar)
    close(plain, tree.scale(-0.1 * 0.2 / (1 - 0.8**5), params_bar))
    state = warm_state(radam, steps=9)
    found = radam.predicted_grads_vjp(state, params, params_bar)
    # The second moment is corrected by the 9 steps that are in it.
    scale = 0.2 / (1 - 0.8**10) * r * math.sqrt(1 - 0.95**9)
    expected = tree.map(
        lambda s, v: -0.1 * scale * v / (s.sqrt() + 1e-2), state.second_moment, params_bar
    )
    close(found, expected)


def test_prediction_converges_to_the_truth_for_steady_gradients() -> None:
    """With g² constant the prediction misses only the term of the gradient's own square."""
    optimizer = AdamW(0.1, (0.9, 0.9999))
    params = {"w": torch.ones(50, dtype=torch.float64)}
    generator = torch.Generator().manual_seed(0)

    def gradient() -> dict[str, torch.Tensor]:
        return {"w": torch.randn(50, dtype=torch.float64, generator=generator).sign()}

    state = optimizer.init(params)
    for _ in range(200):
        params, state = optimizer.update(gradient(), state, params)
    bars = tree.map(torch.ones_like, params)
    predicted = optimizer.predicted_grads_vjp(state, params, bars)
    exact = optimizer.grads_vjp(gradient(), state, params, bars)
    assert tree.norm(tree.axpy(-1.0, exact, predicted)) < 0.05 * tree.norm(exact)


# Golden numbers: complex-step derivatives of K steps on a weighted least-squares problem.

X = torch.tensor([[1.0, 0], [1, 1], [1, 2], [1, 3]], dtype=torch.float64)
Y = torch.tensor([0.0, 1, 1, 3], dtype=torch.float64)
X_UPPER = torch.tensor([[1, 1.5], [1, 2.5]], dtype=torch.float64)
Y_UPPER = torch.tensor([1.0, 2], dtype=torch.float64)
WEIGHTS = torch.tensor([1, 0.5, 2, 1], dtype=torch.float64)


def unrolled(optimizer, start, steps, ridge):
    """Upper loss and d(upper loss)/d(weights) through `steps` lower steps, by chained `vjp`."""
    params = {"w": torch.tensor(start, dtype=torch.float64)}
    state, tape = optimizer.init(params), []
    for _ in range(steps):
        w = params["w"]
        grads = {"w": X.T @ (WEIGHTS * (X @ w - Y)) + ridge * w}
        tape.append((grads, state, params))
        params, state = optimizer.update(grads, state, params)
    residual = X_UPPER @ params["w"] - Y_UPPER
    params_bar, state_bar = {"w": X_UPPER.T @ residual}, None
    hessian = X.T @ (WEIGHTS[:, None] * X) + ridge * torch.eye(2, dtype=torch.float64)
    weights_bar = torch.zeros(4, dtype=torch.float64)
    for grads, state, params in reversed(tape):
        bars = optimizer.vjp(grads, state, params, params_bar, state_bar)
        weights_bar += (X @ params["w"] - Y) * (X @ bars.grads["w"])
        params_bar = tree.add(bars.params, {"w": hessian @ bars.grads["w"]})
        state_bar = bars.state
    return 0.5 * residual.square().sum().item(), weights_bar.tolist()


@pytest.mark.parametrize(
    ("optimizer", "start", "steps", "ridge", "loss", "hypergradient"),
    [
        (SGD(0.05), [0.0, 0], 5, 0.5, 0.026972578388,
         [-0.002090156978, 0.000948993023, 0.005479872241, -0.019099260293]),
        (SGD(0.05, 0.9), [0.0, 0], 5, 0.5, 1.922680326602,
         [-0.0050212566, 0.171247401224, 0.722938797477, 1.389825936053]),
        (SGD(0.1), [0.0, 0], 1, 0.0, None, [0, 1.0675, 1.785, 7.5075]),
        (Adam(0.1), [0.3, -0.2], 5, 0.5, 0.161299858275,
         [3.7695975396e-03, 6.3671022539e-04, 4.7980925373e-03, -1.6114116053e-02]),
        (AdamW(0.1, weight_decay=0.1), [0.3, -0.2], 5, 0.5, 0.169904495210,
         [4.0505561184e-03, 6.1347992020e-04, 5.1477790015e-03, -1.7271860755e-02]),
        (Adam(0.1), [0.3, -0.2], 1, 0.5, 1.992500000860,
         [2.58e-11, -1.01e-10, -1.52e-10, -5.42e-10]),
    ],
    ids=["gd", "momentum", "one-step", "adam", "adamw", "cold-adam"],
)  # fmt: skip
def test_golden_hypergradients(optimizer, start, steps, ridge, loss, hypergradient) -> None:
    found_loss, found = unrolled(optimizer, start, steps, ridge)
    if loss is not None:
        assert found_loss == pytest.approx(loss, rel=1e-10)
    digits = 5e-3 if steps == 1 and isinstance(optimizer, Adam) else 1e-9
    assert found == pytest.approx(hypergradient, rel=digits, abs=1e-12 if digits < 1e-5 else 0)
