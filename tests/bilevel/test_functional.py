"""A module as a function: the values of torch's ``functional_call``, however it is run."""

from __future__ import annotations

import functools
import types
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from bilevel import (
    SGD,
    Auto,
    BilevelProblem,
    BilevelSolver,
    CentralDifference,
    Dot,
    Jvp,
    OneStep,
    PerExample,
    Reverse,
    ReweightingProblem,
    Unrolled,
    functional,
)

DOUBLE = torch.float64


class Net(nn.Module):
    """Two layers, their computation checkpointed or not."""

    def __init__(self, checkpointed: bool):
        super().__init__()
        self.checkpointed = checkpointed
        self.a, self.b = nn.Linear(3, 8, dtype=DOUBLE), nn.Linear(8, 1, dtype=DOUBLE)

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.part, x, use_reentrant=False)
        return self.part(x)

    def part(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x)))).squeeze(-1)


def moved(f):
    """Parameters that are not the module's own."""
    torch.manual_seed(1)
    return {name: leaf + 0.3 * torch.randn_like(leaf) for name, leaf in f.params.items()}


def gradient(call, params):
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    grads = torch.autograd.grad(call(leaves).square().mean(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        torch.testing.assert_close(leaf, right[name], rtol=1e-12, atol=1e-14)


def test_a_recomputed_part_uses_the_parameters_of_the_call():
    plain, recomputed = Net(False), Net(True)
    recomputed.load_state_dict(plain.state_dict())
    f = functional(recomputed)
    params, x = moved(f), torch.randn(5, 3, dtype=DOUBLE)
    expected = gradient(lambda p: functional_call(plain, p, (x,)), params)
    assert_equal(gradient(lambda p: f(p, x), params), expected)


@pytest.mark.parametrize(
    "method",
    [
        OneStep(),
        OneStep(Dot()),
        OneStep(Reverse()),
        OneStep(CentralDifference()),
        OneStep(Auto(), order="upper-first"),
        Unrolled(product=Reverse()),
        Unrolled(product=CentralDifference()),
    ],
    ids=str,
)
def test_checkpointing_changes_no_number_of_a_run(method):
    torch.manual_seed(0)
    plain, recomputed = Net(False), Net(True)
    recomputed.load_state_dict(plain.state_dict())
    single = isinstance(method, OneStep) and isinstance(method.route, Dot)
    batches = [{"x": torch.randn(4, 3, dtype=DOUBLE), "i": torch.arange(4)} for _ in range(6)]

    def run(net):
        f = functional(net)

        def per_example(t, b):
            return f(t, b["x"]) ** 2, None

        problem = ReweightingProblem(
            per_example,
            lambda p, b, _: torch.exp(p["r"][b["i"]]),
            lambda t, p, b: per_example(t, b)[0].mean(),
        )
        solver = BilevelSolver(problem, SGD(0.5), SGD(1.0), method, accumulation=4 if single else 1)
        state = solver.init(f.params, {"r": torch.zeros(4, dtype=DOUBLE)})
        for batch in batches:
            parts = [batch]
            if single:
                parts = [{key: v[row : row + 1] for key, v in batch.items()} for row in range(4)]
            state, _ = solver.window(state, [parts], batch)
        return {**state.lower_params, **state.upper_params}

    ends, expected = run(recomputed), run(plain)
    tolerance = 1e-6 if "CentralDifference" in str(method) else 1e-12
    for name, leaf in ends.items():
        torch.testing.assert_close(leaf, expected[name], rtol=tolerance, atol=tolerance)
    assert all(float(leaf.abs().max()) > 0 for leaf in ends.values())


@pytest.mark.parametrize(
    "method",
    [OneStep(), OneStep(Jvp()), OneStep(Reverse()), Unrolled(), Unrolled(product=Reverse())],
    ids=str,
)
def test_a_checkpoint_within_a_checkpoint_changes_no_number(method):
    class Nested(Net):
        def forward(self, x):
            part = super().forward
            return checkpoint(part, x, use_reentrant=False) if self.checkpointed else part(x)

    torch.manual_seed(0)
    nets = Nested(False), Nested(True)
    nets[1].load_state_dict(nets[0].state_dict())
    x, found = torch.randn(4, 3, dtype=DOUBLE), []
    for net in nets:
        f = functional(net)
        problem = ReweightingProblem(
            lambda t, b, f=f: (f(t, b) ** 2, None),
            lambda p, b, _: torch.exp(p["r"]),
            lambda t, p, b, f=f: (f(t, b) - 1).square().mean(),
        )
        steps = 2 if isinstance(method, Unrolled) else 1
        solver = BilevelSolver(problem, SGD(0.5), SGD(1.0), method, unroll_steps=steps)
        state = solver.init(f.params, {"r": torch.zeros(4, dtype=DOUBLE)})
        found.append(solver.window(state, [[x]] * steps, x)[0])
    assert float(found[0].upper_params["r"].norm()) > 1e-4
    assert_equal(found[1].upper_params, found[0].upper_params)
    assert_equal(found[1].lower_params, found[0].lower_params)


def test_forward_over_reverse_of_a_checkpoint_names_the_routes_that_have_it():
    f = functional(Net(True))
    problem = BilevelProblem(
        lambda t, p, b: (f(t, b).square() * p["r"].exp()).mean(), lambda t, p, b: f(t, b).mean()
    )
    x, phi = torch.randn(4, 3, dtype=DOUBLE), {"r": torch.zeros(4, dtype=DOUBLE)}
    solver = BilevelSolver(problem, SGD(0.5), SGD(1.0), OneStep(Jvp()))
    with pytest.raises(RuntimeError, match=r"or choose the route Reverse\(\) or Central"):
        solver.step(solver.init(f.params, phi), [x], x)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_transformers_checkpoint_with_the_parameters_of_the_call(name):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    size["num_hidden_layers"] = 2
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**size, num_key_value_heads=2, vocab_size=23)
        model, kwargs = transformers.LlamaForCausalLM(config), {"use_cache": False}
    elif name == "bert":
        config = transformers.BertConfig(**size, vocab_size=23, hidden_dropout_prob=0.3)
        model, kwargs = transformers.BertForMaskedLM(config), {}
    else:
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=23)
        model, kwargs = transformers.GPT2LMHeadModel(config), {"use_cache": False}
    model = model.train()
    f = functional(model)
    assert len(f.tied) == {"llama": 0, "bert": 2, "gpt2": 1}[name]
    params, ids = moved(f), torch.randint(0, 23, (3, 6))

    def call(p):
        torch.manual_seed(5)
        return f(p, input_ids=ids, **kwargs).logits

    def swapped(p):
        torch.manual_seed(5)
        return functional_call(model, p, (), dict(input_ids=ids, **kwargs)).logits

    expected = gradient(swapped, params)
    own = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    model.activation_checkpointing_enable()
    for name, leaf in gradient(call, params).items():
        torch.testing.assert_close(leaf, expected[name], rtol=1e-5, atol=1e-7)
    for name, leaf in model.state_dict().items():
        assert torch.equal(leaf, own[name])


def test_checkpointing_by_transformers_is_never_reentrant_in_a_call():
    """Behind frozen embeddings the reentrant way gives the layers no gradient, without a word."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=23,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    model.model.embed_tokens.requires_grad_(False)
    ids = torch.randint(0, 23, (3, 6))

    def call(f):
        return lambda p: f(p, input_ids=ids, use_cache=False).logits

    f = functional(model)
    params = moved(f)
    expected = gradient(call(f), params)
    model.activation_checkpointing_enable({"use_reentrant": True})
    for g in (f, functional(model)):
        for name, leaf in gradient(call(g), params).items():
            torch.testing.assert_close(leaf, expected[name], rtol=1e-5, atol=1e-7)
    layer = model.model.layers[0]
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": True}  # left alone


def test_tied_parameters_appear_once_and_frozen_ones_are_named():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    net["d"] = net["c"]
    net["c"].bias.requires_grad_(False)
    f = functional(net)
    assert f.names == ("a.weight", "a.bias", "b.bias", "c.weight")
    assert f.frozen == ("c.bias",)
    assert f.tied == {"b.weight": "a.weight", "d.weight": "c.weight", "d.bias": "c.bias"}
    assert repr(f) == "functional(ModuleDict: 4 parameters, 1 frozen, 3 tied)"
    bound = f.bind(f.params)
    assert bound["b"].weight is bound["a"].weight
    assert bound["d"] is bound["c"]
    with pytest.raises(ValueError, match=r"'b.weight' is given as 'a.weight'; 'c.bias' is frozen"):
        f({**f.params, "b.weight": torch.zeros(3, 3), "c.bias": torch.zeros(3)}, None)


class Hidden(nn.Module):
    """Reaches its layers in every way but the registered one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=DOUBLE)
        self.scale = nn.Parameter(torch.ones(2, dtype=DOUBLE))
        self.listed = [self.layer]
        self.method = self.layer.forward
        self.partial = functools.partial(self.times, factor=2.0)
        self.closure = lambda x: self.layer(x) * self.scale
        self.weak = weakref.ref(self.layer)
        self.holder = types.SimpleNamespace(inner={"scale": self.scale})
        self.config = types.SimpleNamespace(width=2)
        self.forward = self.replaced
        self.register_forward_hook(lambda module, args, output: output * self.scale)

    def times(self, x, factor):
        return self.layer(x) * factor

    def replaced(self, x):
        for apply in (self.listed[0], self.method, self.partial, self.closure, self.weak()):
            x = torch.tanh(apply(x))
        return x + self.holder.inner["scale"]


def test_modules_and_parameters_are_found_past_the_registered_ones():
    net = Hidden()
    f = functional(net)
    params, x = moved(f), torch.randn(4, 2, dtype=DOUBLE)
    expected = Hidden()
    expected.load_state_dict(params)
    torch.testing.assert_close(f(params, x), expected(x), rtol=1e-14, atol=0)
    assert f.bind(params).config is net.config
    grads = gradient(lambda p: f(p, x), params)
    for name, own in expected.named_parameters():
        (reference,) = torch.autograd.grad(expected(x).square().mean(), [own])
        torch.testing.assert_close(grads[name], reference)


def test_a_forward_that_is_replaced_later_is_seen():
    net = Net(False)
    f = functional(net)
    params, x = moved(f), torch.randn(4, 3, dtype=DOUBLE)
    expected = f(params, x) * 2
    own = net.forward
    net.forward = lambda x: own(x) * 2
    assert torch.equal(f(params, x), expected)


def test_an_object_that_cannot_be_copied_is_named():
    net = Net(False)
    net.cached = functools.lru_cache(net.part)
    with pytest.raises(TypeError, match=r"'cached' of Net .* _lru_cache_wrapper"):
        functional(net)


MODULES = {
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), lambda out: out[0]),
    "gru": (lambda: nn.GRU(3, 4), lambda out: out[0]),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda out: out,
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        lambda out: out,
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(3, 1, 5, dropout=0.0), lambda out: out),
    "batch norm": (lambda: nn.BatchNorm1d(5), lambda out: out),
}


@pytest.mark.parametrize("kind", list(MODULES))
def test_the_values_and_gradients_are_those_of_functional_call(kind):
    make, output = MODULES[kind]
    torch.manual_seed(0)
    net = make().to(DOUBLE)
    f, x = functional(net), torch.randn(2, 5, 3, dtype=DOUBLE)
    params, buffers = moved(f), f.buffers

    def swapped(p):
        held = {name: leaf.clone() for name, leaf in buffers.items()}
        return output(functional_call(net, {**p, **held}, (x,)))

    expected = gradient(swapped, params)
    for _ in range(2):  # no call leaves anything behind
        assert torch.equal(output(f(params, x)), swapped(params))
        assert_equal(gradient(lambda p: output(f(p, x)), params), expected)
    for name, leaf in net.named_buffers():
        assert torch.equal(leaf, buffers[name])


def test_calls_go_through_the_transforms_of_torch_func():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(DOUBLE)
    f = functional(net)
    params, x = moved(f), torch.randn(5, 3, dtype=DOUBLE)
    direction = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    loss = lambda p: f(p, x).square().mean()  # noqa: E731
    slope = jvp(loss, (params,), (direction,))[1]
    reference = gradient(lambda p: f(p, x), params)
    expected = sum((reference[name] * direction[name]).sum() for name in params)
    torch.testing.assert_close(slope, expected)
    assert_equal(grad(loss)(params), reference)
    stacked = {name: torch.stack([leaf, 2 * leaf]) for name, leaf in params.items()}
    net.eval()
    torch.testing.assert_close(
        vmap(lambda p: f(p, x))(stacked)[1], f({name: 2 * leaf for name, leaf in params.items()}, x)
    )


@pytest.mark.parametrize("route", [Jvp(), Reverse(), CentralDifference(), Auto()], ids=str)
def test_batch_normalisation_trains_on_every_route(route):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(DOUBLE)
    f = functional(net)
    x, y = torch.randn(6, 3, dtype=DOUBLE), torch.randn(6, dtype=DOUBLE)

    def lower(t, p, b):
        return (torch.exp(p["r"]) * (f(t, x).squeeze(1) - y) ** 2).mean()

    problem = BilevelProblem(lower, lambda t, p, b: (f(t, x).squeeze(1) ** 2).mean())
    solver = BilevelSolver(problem, SGD(0.1), SGD(1.0), OneStep(route))
    phi = {"r": torch.zeros(6, dtype=DOUBLE)}
    state, _ = solver.step(solver.init(f.params, phi), [0], 0)
    leaves = {name: leaf.requires_grad_() for name, leaf in f.params.items()}
    raw = torch.zeros(6, dtype=DOUBLE, requires_grad=True)
    inner = lower(leaves, {"r": raw}, None)
    grads = torch.autograd.grad(inner, list(leaves.values()), create_graph=True)
    after = {n: leaf - 0.1 * g for (n, leaf), g in zip(leaves.items(), grads, strict=True)}
    (expected,) = torch.autograd.grad((f(after, x).squeeze(1) ** 2).mean(), [raw])
    torch.testing.assert_close(-state.upper_params["r"], expected, rtol=1e-6, atol=1e-9)
    assert int(net[1].num_batches_tracked) == 0


def test_running_statistics_are_kept_when_asked_for():
    torch.manual_seed(0)
    net, twin = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    f, x = functional(net), torch.randn(7, 3)
    f(f.params, x)
    assert torch.equal(net.running_mean, torch.zeros(3))
    f.update_buffers(f.params, x)
    twin(x)
    assert torch.equal(net.running_mean, twin.running_mean)
    assert torch.equal(net.running_var, twin.running_var)
    assert int(net.num_batches_tracked) == 1


def test_per_example_rules_see_the_parameters_of_the_call():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DOUBLE)
    f = functional(net)
    problem = ReweightingProblem(
        lambda t, b: (f(t, b).squeeze(1) ** 2, None),
        lambda p, b, _: torch.sigmoid(p["r"]),
        lambda t, p, b: f(t, b).mean(),
    )
    solver = BilevelSolver(problem, SGD(0.1), SGD(1.0), OneStep(PerExample()))
    state = solver.init(f.params, {"r": torch.zeros(5, dtype=DOUBLE)})
    x = torch.randn(5, 3, dtype=DOUBLE)
    _, info = solver.step(state, [x], x)
    assert info.notes == ()
    assert float(info.hypergradient_norm) > 0


def test_what_a_call_sets_on_the_module_is_found_there():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.calls, self.penalty = nn.Parameter(torch.ones(2)), 0, None

        def forward(self, x):
            self.calls += 1
            self.penalty = self.w.square().sum()
            return x * self.w

    net = Counting()
    f = functional(net)
    params = {"w": torch.full((2,), 3.0, requires_grad=True)}
    f(params, torch.ones(2))
    f(params, torch.ones(2))
    assert net.calls == 2
    assert torch.autograd.grad(net.penalty, params["w"])[0].tolist() == [6.0, 6.0]
    assert isinstance(net.w, nn.Parameter)


def test_parameters_are_clones_and_are_written_back():
    net = nn.Linear(2, 2)
    f = functional(net)
    before = net.weight.detach().clone()
    f.params["weight"].zero_()
    assert torch.equal(net.weight, before)
    own, params = net.weight, {name: leaf + 1 for name, leaf in f.params.items()}
    with pytest.raises(ValueError, match=r"'bias' has shape \(2,\) in the module, found \(3,\)"):
        f.write_back({**params, "bias": torch.zeros(3)})
    assert torch.equal(net.weight, before)
    f.write_back(params)
    assert net.weight is own
    assert torch.equal(net.weight, before + 1)
    with pytest.raises(ValueError, match=r"missing \['bias'\], unknown \[\]"):
        f({"weight": before}, torch.ones(2))


def test_what_is_no_plain_module_is_refused():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, found dict"):
        functional({})
    with pytest.raises(TypeError, match="run the module once first"):
        functional(nn.LazyLinear(3))
    with pytest.raises(TypeError, match=r"is compiled by torch.compile"):
        functional(torch.compile(nn.Linear(2, 2), backend="eager"))
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    net[1].weight.data = net[0].weight.data
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' share memory"):
        functional(net)
    net = nn.ModuleList([nn.Linear(2, 2)])
    f = functional(net)
    net.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="ModuleList has other submodules or parameters"):
        f.bind(f.params)


def test_a_call_of_the_compiled_module_itself_is_left_aside():
    net = nn.Linear(2, 2)
    net._compiled_call_impl = lambda x: x * 0  # what module.compile() sets
    f = functional(net)
    params, x = moved(f), torch.randn(3, 2)
    expected = nn.functional.linear(x, params["weight"], params["bias"])
    assert torch.equal(f(params, x), expected)
