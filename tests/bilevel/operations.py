"""Every operation of torch.nn.functional, and common modules, as losses of two examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

F64 = torch.float64
SIZE, EXAMPLES = 12, 3


@dataclass(frozen=True)
class Operation:
    """An operation on features of the model: (h [EXAMPLES, SIZE], parameters) -> [EXAMPLES, …].

    Attributes:
        name: As in the page.
        kind: Its heading there.
        apply: The operation.
        params: Further lower parameters of its own.
        reference: The same by other operations, where torch's second derivatives are wrong.
    """

    name: str
    kind: str
    apply: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    params: Mapping[str, Tensor] = field(default_factory=dict)
    reference: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def pairs(h: Tensor) -> Tensor:
    """Features as points: [EXAMPLES, 4, 3]."""
    return h.view(-1, 4, 3)


def image(h: Tensor) -> Tensor:
    """Features as pictures: [EXAMPLES, 2, 4, 6], of them with a pattern of their own."""
    pattern = 0.3 + torch.arange(48, dtype=F64).sin()
    return (h.repeat(1, 4) * pattern).view(-1, 2, 4, 6)


def volume(h: Tensor) -> Tensor:
    """Features as volumes: [EXAMPLES, 2, 2, 4, 3]."""
    return image(h).reshape(-1, 2, 2, 4, 3)


def sequence(h: Tensor) -> Tensor:
    """Features as signals: [EXAMPLES, 2, 12]."""
    return image(h).reshape(-1, 4, 12)[:, :2]


def simple(kind: str, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> list[Operation]:
    return [Operation(name, kind, lambda h, _, f=f: f(h)) for name, f in functions.items()]


def with_params(
    kind: str,
    functions: Mapping[
        str, tuple[Callable[[Tensor, Mapping[str, Tensor]], Tensor], dict[str, Tensor]]
    ],
) -> list[Operation]:
    return [Operation(name, kind, f, params) for name, (f, params) in functions.items()]


ACTIVATIONS = simple(
    "activations",
    {
        **{
            name: getattr(F, name)
            for name in (
                *("relu", "relu6", "elu", "selu", "celu", "leaky_relu", "silu", "mish", "softplus"),
                *("softsign", "tanh", "sigmoid", "logsigmoid", "hardtanh", "hardswish"),
                *("hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "gelu", "rrelu", "glu"),
            )
        },
        "gelu (tanh)": lambda h: F.gelu(h, approximate="tanh"),
        "rrelu (training)": lambda h: F.rrelu(h, training=True),
        "threshold": lambda h: F.threshold(h, 0.1, 0.2),
        "softmax": lambda h: F.softmax(h, 1),
        "softmin": lambda h: F.softmin(h, 1),
        "log_softmax": lambda h: F.log_softmax(h, 1),
        "gumbel_softmax": lambda h: F.gumbel_softmax(h, 0.7),
        "gumbel_softmax (hard)": lambda h: F.gumbel_softmax(h, 0.7, hard=True),
        "in place: relu_, elu_, celu_, leaky_relu_, selu_": lambda h: (
            F.relu_(h * 1) + F.elu_(h * 1) + F.celu_(h * 1) + F.leaky_relu_(h * 1) + F.selu_(h * 1)
        ),
        "in place: hardtanh_, threshold_, rrelu_": lambda h: (
            F.hardtanh_(h * 1) + F.threshold_(h * 1, 0.1, 0.2) + F.rrelu_(h * 1)
        ),
    },
) + with_params(
    "activations",
    {"prelu": (lambda h, p: F.prelu(h.view(-1, 4, 3), p["a"]), {"a": draw(4).abs()})},
)

NORMS = simple(
    "normalisation",
    {
        "normalize": lambda h: F.normalize(h, dim=1),
        "local_response_norm": lambda h: F.local_response_norm(sequence(h), 2),
        "instance_norm": lambda h: F.instance_norm(sequence(h)),
        "batch_norm (training, no affine)": lambda h: F.batch_norm(h, None, None, training=True),
        "layer_norm (no affine)": lambda h: F.layer_norm(h, (SIZE,)),
    },
) + with_params(
    "normalisation",
    {
        "layer_norm": (
            lambda h, p: F.layer_norm(h, (SIZE,), p["a"], p["c"]),
            {"a": draw(SIZE), "c": draw(SIZE)},
        ),
        "rms_norm": (lambda h, p: F.rms_norm(h, (SIZE,), p["a"]), {"a": draw(SIZE)}),
        "group_norm": (
            lambda h, p: F.group_norm(pairs(h), 2, p["a"], p["c"]),
            {"a": draw(4), "c": draw(4)},
        ),
        "batch_norm (evaluation)": (
            lambda h, p: F.batch_norm(h, draw(SIZE), draw(SIZE).abs() + 0.5, p["a"], p["c"]),
            {"a": draw(SIZE), "c": draw(SIZE)},
        ),
        "batch_norm (training)": (
            lambda h, p: F.batch_norm(h, None, None, p["a"], p["c"], training=True),
            {"a": draw(SIZE), "c": draw(SIZE)},
        ),
        "instance_norm (affine)": (
            lambda h, p: F.instance_norm(sequence(h), weight=p["a"], bias=p["c"]),
            {"a": draw(2), "c": draw(2)},
        ),
    },
)


def unpooled(h: Tensor, dimensions: int) -> Tensor:
    x = {1: sequence, 2: image, 3: volume}[dimensions](h)
    window = {1: 2, 2: 2, 3: (2, 2, 1)}[dimensions]
    pool, unpool = (getattr(F, f"{name}{dimensions}d") for name in ("max_pool", "max_unpool"))
    values, indices = pool(x, window, return_indices=True)
    return unpool(values, indices, window)


POOLS = simple(
    "pooling",
    {
        "avg_pool1d": lambda h: F.avg_pool1d(sequence(h), 3),
        "avg_pool2d": lambda h: F.avg_pool2d(image(h), 2),
        "avg_pool3d": lambda h: F.avg_pool3d(volume(h), 2),
        "max_pool1d": lambda h: F.max_pool1d(sequence(h), 3),
        "max_pool2d": lambda h: F.max_pool2d(image(h), 2),
        "max_pool3d": lambda h: F.max_pool3d(volume(h), 2),
        "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(sequence(h), 5),
        "adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(image(h), 3),
        "adaptive_avg_pool3d": lambda h: F.adaptive_avg_pool3d(volume(h), 2),
        "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(sequence(h), 5),
        "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(image(h), 3),
        "adaptive_max_pool3d": lambda h: F.adaptive_max_pool3d(volume(h), 2),
        "lp_pool1d": lambda h: F.lp_pool1d(sequence(h), 2, 3),
        "lp_pool2d": lambda h: F.lp_pool2d(image(h), 2, 2),
        "lp_pool3d": lambda h: F.lp_pool3d(volume(h), 2, 2),
        "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(image(h), 2, 3),
        "fractional_max_pool3d": lambda h: F.fractional_max_pool3d(volume(h), (1, 2, 2), (1, 2, 1)),
        "max_unpool1d": lambda h: unpooled(h, 1),
        "max_unpool2d": lambda h: unpooled(h, 2),
        "max_unpool3d": lambda h: unpooled(h, 3),
    },
)

CONVOLUTIONS = with_params(
    "linear maps and convolutions",
    {
        "linear": (lambda h, p: F.linear(h, p["w2"], p["c"]), {"w2": draw(5, SIZE), "c": draw(5)}),
        "bilinear": (
            lambda h, p: F.bilinear(h[:, :4], h[:, 4:8], p["w2"], p["c"]),
            {"w2": draw(5, 4, 4), "c": draw(5)},
        ),
        "conv1d": (
            lambda h, p: F.conv1d(sequence(h), p["w2"], p["c"], padding=1),
            {"w2": draw(3, 2, 3), "c": draw(3)},
        ),
        "conv2d": (
            lambda h, p: F.conv2d(image(h), p["w2"], p["c"], stride=2),
            {"w2": draw(3, 2, 2, 2), "c": draw(3)},
        ),
        "conv3d": (lambda h, p: F.conv3d(volume(h), p["w2"]), {"w2": draw(3, 2, 2, 2, 2)}),
        "conv_transpose1d": (
            lambda h, p: F.conv_transpose1d(sequence(h), p["w2"], p["c"]),
            {"w2": draw(2, 3, 2), "c": draw(3)},
        ),
        "conv_transpose2d": (
            lambda h, p: F.conv_transpose2d(image(h), p["w2"], stride=2),
            {"w2": draw(2, 3, 2, 2)},
        ),
        "conv_transpose3d": (
            lambda h, p: F.conv_transpose3d(volume(h), p["w2"]),
            {"w2": draw(2, 2, 2, 1, 2)},
        ),
        "conv_tbc": (
            lambda h, p: torch.stack(  # its backward wants a contiguous gradient
                F.conv_tbc(sequence(h).permute(2, 0, 1).contiguous(), p["w2"], p["c"]).unbind(1)
            ),
            {"w2": draw(2, 2, 3), "c": draw(3)},
        ),
        "unfold, fold": (
            lambda h, p: F.fold(F.unfold(image(h), 2) * 1.5, (4, 6), 2),
            {},
        ),
    },
)

TOKENS = torch.tensor([[0, 2, 1, 4], [3, 1, 1, 0], [2, 2, 4, 3]])

EMBEDDINGS = with_params(
    "embeddings",
    {
        "embedding": (
            lambda h, p: F.embedding(TOKENS[: len(h)], p["e"]).sum(1) * h[:, :3],
            {"e": draw(5, 3)},
        ),
        "embedding (padding_idx)": (
            lambda h, p: F.embedding(TOKENS[: len(h)], p["e"], 2).sum(1) * h[:, :3],
            {"e": draw(5, 3)},
        ),
        "embedding (sparse)": (
            lambda h, p: F.embedding(TOKENS[: len(h)], p["e"], sparse=True).sum(1) * h[:, :3],
            {"e": draw(5, 3)},
        ),
        "embedding (max_norm)": (
            lambda h, p: F.embedding(TOKENS[: len(h)], p["e"] * 1, max_norm=1.0).sum(1) * h[:, :3],
            {"e": draw(5, 3)},
        ),
        "embedding (scale_grad_by_freq)": (
            lambda h, p: (
                F.embedding(TOKENS[: len(h)], p["e"], scale_grad_by_freq=True).sum(1) * h[:, :3]
            ),
            {"e": draw(5, 3)},
        ),
        **{
            f"embedding_bag ({mode})": (
                lambda h, p, mode=mode: (
                    F.embedding_bag(TOKENS[: len(h)], p["e"], mode=mode) * h[:, :3]
                ),
                {"e": draw(5, 3)},
            )
            for mode in ("sum", "mean", "max")
        },
    },
)


def heads(h: Tensor) -> Tensor:
    """Features as queries, keys and values: [EXAMPLES, 2, 3, 8]."""
    return image(h).reshape(-1, 2, 3, 8)


ATTENTION = simple(
    "attention",
    {
        "scaled_dot_product_attention": lambda h: F.scaled_dot_product_attention(
            heads(h), heads(h.sin()), heads(h.cos())
        ),
        "… causal": lambda h: F.scaled_dot_product_attention(
            heads(h), heads(h.sin()), heads(h.cos()), is_causal=True
        ),
        "… with a mask": lambda h: F.scaled_dot_product_attention(
            heads(h), heads(h.sin()), heads(h.cos()), attn_mask=draw(3, 3) > -0.5
        ),
        "… with a bias of θ": lambda h: F.scaled_dot_product_attention(
            heads(h), heads(h.sin()), heads(h.cos()), attn_mask=heads(h)[..., :3]
        ),
        "… with dropout": lambda h: F.scaled_dot_product_attention(
            heads(h), heads(h.sin()), heads(h.cos()), dropout_p=0.3
        ),
        "… grouped": lambda h: F.scaled_dot_product_attention(
            heads(h), heads(h.sin())[:, :1], heads(h.cos())[:, :1], enable_gqa=True
        ),
    },
)

DROPOUTS = simple(
    "dropout",
    {
        "dropout": lambda h: F.dropout(h, 0.3),
        "alpha_dropout": lambda h: F.alpha_dropout(h, 0.3, training=True),
        "dropout (transposed)": lambda h: F.dropout(pairs(h).transpose(1, 2), 0.3),
        "alpha_dropout (transposed)": lambda h: F.alpha_dropout(h.t(), 0.3, training=True).t(),
        "dropout1d": lambda h: F.dropout1d(sequence(h), 0.3),
        "dropout2d": lambda h: F.dropout2d(image(h), 0.3),
        "dropout3d": lambda h: F.dropout3d(volume(h), 0.3),
        "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(pairs(h), 0.3, training=True),
    },
)

DISTANCES = simple(
    "distances",
    {
        "cosine_similarity": lambda h: F.cosine_similarity(h, h.roll(1, 1).sin())[:, None],
        "pairwise_distance": lambda h: F.pairwise_distance(h, h.roll(1, 1).sin())[:, None],
        "pdist": lambda h: torch.stack([F.pdist(one) for one in pairs(h)]),
    },
)


def sampled(h: Tensor, **options: str) -> Tensor:
    grid = torch.tanh(h[:, :8].view(-1, 2, 2, 2) + draw(2, 2, 2))
    return F.grid_sample(image(h), grid, align_corners=False, **options)


VISION = simple(
    "vision",
    {
        "pixel_shuffle": lambda h: F.pixel_shuffle(pairs(h)[..., None], 2),
        "pixel_unshuffle": lambda h: F.pixel_unshuffle(image(h), 2),
        "channel_shuffle": lambda h: F.channel_shuffle(pairs(h)[..., None], 2),
        "native_channel_shuffle": lambda h: F.native_channel_shuffle(pairs(h)[..., None], 2),
        **{
            f"pad ({mode})": lambda h, mode=mode: F.pad(image(h), (1, 2, 0, 1), mode=mode)
            for mode in ("constant", "reflect", "replicate", "circular")
        },
        **{
            f"interpolate ({mode})": lambda h, mode=mode: F.interpolate(
                image(h), scale_factor=2, mode=mode
            )
            for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
        },
        "interpolate (linear)": lambda h: F.interpolate(sequence(h), 7, mode="linear"),
        "interpolate (trilinear)": lambda h: F.interpolate(volume(h), (3, 2, 4), mode="trilinear"),
        "interpolate (antialias)": lambda h: F.interpolate(
            image(h), 3, mode="bilinear", antialias=True
        ),
        **{
            f"grid_sample ({mode}, {padding})": lambda h, mode=mode, padding=padding: sampled(
                h, mode=mode, padding_mode=padding
            )
            for mode, padding in (
                ("bilinear", "zeros"),
                ("bilinear", "border"),
                ("nearest", "zeros"),
                ("bicubic", "zeros"),
            )
        },
        "affine_grid": lambda h: F.affine_grid(
            h[:, :6].view(-1, 2, 3), [len(h), 1, 3, 3], align_corners=False
        ),
    },
)

TARGETS = draw(EXAMPLES, SIZE)
SIGNS = TARGETS.sign()
CLASSES = torch.tensor([2, 0, 7])
SHARES = torch.softmax(TARGETS, 1)


def loss(
    name: str, *targets: Tensor, form: Callable[[Tensor], Tensor] = lambda h: h, **options: object
):
    """A loss per example of torch, its targets being those of as many examples."""
    function = getattr(F, name)

    def apply(h: Tensor) -> Tensor:
        out = function(form(h), *(one[: len(h)] for one in targets), reduction="none", **options)
        return out if out.dim() > 1 else out[:, None]

    return apply


def mean_of_each(name: str, *targets: Tensor, form: Callable[[Tensor], Tensor] = lambda h: h):
    """Its mean over each example's own entries, by its own reduction."""
    function = getattr(F, name)

    def apply(h: Tensor) -> Tensor:
        rows = zip(form(h), *(one[: len(h)] for one in targets), strict=True)
        return torch.stack([function(*row) for row in rows])[:, None]

    return apply


LOSSES = simple(
    "losses",
    {
        **{
            name: loss(name, TARGETS)
            for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
        },
        "mse_loss (weight)": loss("mse_loss", TARGETS, weight=TARGETS.abs()),
        "huber_loss (delta 0.3)": loss("huber_loss", TARGETS, delta=0.3),
        "smooth_l1_loss (beta 0)": loss("smooth_l1_loss", TARGETS, beta=0.0),
        **{
            f"{name} (mean)": mean_of_each(name, TARGETS)
            for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
        },
        "soft_margin_loss": loss("soft_margin_loss", SIGNS),
        "soft_margin_loss (mean)": mean_of_each("soft_margin_loss", SIGNS),
        "hinge_embedding_loss": loss("hinge_embedding_loss", SIGNS),
        "binary_cross_entropy": loss("binary_cross_entropy", SHARES, form=torch.sigmoid),
        "binary_cross_entropy (mean)": mean_of_each(
            "binary_cross_entropy", SHARES, form=torch.sigmoid
        ),
        "binary_cross_entropy_with_logits": loss(
            "binary_cross_entropy_with_logits", SHARES, pos_weight=TARGETS[0].abs()
        ),
        "cross_entropy": loss("cross_entropy", CLASSES),
        "cross_entropy (label_smoothing)": loss("cross_entropy", CLASSES, label_smoothing=0.1),
        "cross_entropy (probabilities)": loss("cross_entropy", SHARES),
        "cross_entropy (weight)": loss("cross_entropy", CLASSES, weight=TARGETS[0].abs()),
        "nll_loss": loss("nll_loss", CLASSES, form=lambda h: F.log_softmax(h, 1)),
        "kl_div": loss("kl_div", SHARES, form=lambda h: F.log_softmax(h, 1)),
        "kl_div (log_target)": loss(
            "kl_div", SHARES.log(), form=lambda h: F.log_softmax(h, 1), log_target=True
        ),
        "poisson_nll_loss": loss("poisson_nll_loss", TARGETS.abs()),
        "gaussian_nll_loss": loss("gaussian_nll_loss", TARGETS, TARGETS.abs() + 0.5),
        "gaussian_nll_loss (variance of θ)": lambda h: F.gaussian_nll_loss(
            h, TARGETS[: len(h)], h.exp(), reduction="none"
        ),
        "cosine_embedding_loss": loss("cosine_embedding_loss", TARGETS, SIGNS[:, 0]),
        "margin_ranking_loss": loss("margin_ranking_loss", TARGETS, SIGNS),
        "triplet_margin_loss": loss("triplet_margin_loss", TARGETS, SHARES),
        "triplet_margin_with_distance_loss": loss(
            "triplet_margin_with_distance_loss", TARGETS, SHARES
        ),
        "multilabel_soft_margin_loss": loss("multilabel_soft_margin_loss", SIGNS.clamp(0)),
        "multilabel_margin_loss": loss(
            "multilabel_margin_loss",
            torch.tensor([[0, 2, -1] + [0] * 9, [4, -1, 0] + [0] * 9, [1, 3, -1] + [0] * 9]),
        ),
        "multi_margin_loss": loss("multi_margin_loss", CLASSES),
        "ctc_loss": lambda h: F.ctc_loss(
            F.log_softmax(pairs(h).transpose(0, 1), 2),
            torch.tensor([[1, 2], [2, 1], [1, 1]])[: len(h)],
            (4,) * len(h),
            (2,) * len(h),
            reduction="none",
        )[:, None],
    },
) + with_params(
    "losses",
    {
        "linear_cross_entropy": (
            lambda h, p: F.linear_cross_entropy(
                h, p["w2"], CLASSES[: len(h)] % 5, reduction="none"
            )[:, None],
            {"w2": draw(5, SIZE)},
        )
    },
)


def module(make: Callable[[], nn.Module], call: Callable[..., Tensor], train: bool = True):
    """A module under functional_call, buffers copied as its documentation asks."""
    torch.manual_seed(0)
    net = make().double().train(train)
    params = {name: value.detach() for name, value in net.named_parameters()}

    def apply(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        own = {name: p[name] for name in params}
        buffers = {name: value.clone() for name, value in net.named_buffers()}
        return call(lambda *args, **kwargs: functional_call(net, own | buffers, args, kwargs), h)

    return apply, params


MODULES = with_params(
    "modules",
    {
        "RNN": module(lambda: nn.RNN(3, 4, batch_first=True), lambda m, h: m(pairs(h))[0]),
        "GRU": module(lambda: nn.GRU(3, 4, batch_first=True), lambda m, h: m(pairs(h))[0]),
        "LSTM (2 layers, both directions)": module(
            lambda: nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True),
            lambda m, h: m(pairs(h))[0],
        ),
        "LSTM (2 layers, dropout)": module(
            lambda: nn.LSTM(3, 2, 2, batch_first=True, dropout=0.3), lambda m, h: m(pairs(h))[0]
        ),
        "GRUCell": module(lambda: nn.GRUCell(SIZE, 4), lambda m, h: m(h)),
        "LSTMCell": module(lambda: nn.LSTMCell(SIZE, 4), lambda m, h: m(h)[0]),
        "MultiheadAttention": module(
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            lambda m, h: m(*[h.view(-1, 3, 4)] * 3, need_weights=False)[0],
        ),
        "MultiheadAttention (weights)": module(
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            lambda m, h: m(*[h.view(-1, 3, 4)] * 3)[0],
        ),
        "TransformerEncoderLayer": module(
            lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            lambda m, h: m(h.view(-1, 3, 4)),
        ),
        "TransformerEncoderLayer (evaluation)": module(
            lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            lambda m, h: m(h.view(-1, 3, 4)),
            train=False,
        ),
        "TransformerDecoderLayer": module(
            lambda: nn.TransformerDecoderLayer(4, 2, 6, batch_first=True),
            lambda m, h: m(h.view(-1, 3, 4), h.sin().view(-1, 3, 4)),
        ),
        "BatchNorm1d (training)": module(lambda: nn.BatchNorm1d(SIZE), lambda m, h: m(h)),
        "BatchNorm1d (evaluation)": module(
            lambda: nn.BatchNorm1d(SIZE), lambda m, h: m(h), train=False
        ),
        "Bilinear": module(lambda: nn.Bilinear(4, 8, 3), lambda m, h: m(h[:, :4], h[:, 4:])),
        "PReLU": module(lambda: nn.PReLU(4), lambda m, h: m(pairs(h))),
        "weight_norm": module(
            lambda: parametrizations.weight_norm(nn.Linear(SIZE, 4)), lambda m, h: m(h)
        ),
        "spectral_norm (training)": module(
            lambda: parametrizations.spectral_norm(nn.Linear(SIZE, 4)), lambda m, h: m(h)
        ),
        "spectral_norm (evaluation)": module(
            lambda: parametrizations.spectral_norm(nn.Linear(SIZE, 4)), lambda m, h: m(h), False
        ),
        "orthogonal": module(
            lambda: parametrizations.orthogonal(nn.Linear(4, 4)), lambda m, h: m(h[:, :4])
        ),
    },
)


def weight_norm_by_hand(h: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    g, v = (p[f"parametrizations.weight.original{one}"] for one in (0, 1))
    return F.linear(h, g * v / v.square().sum(1, keepdim=True).sqrt(), p["bias"])


MODULES = [
    replace(one, reference=weight_norm_by_hand) if one.name == "weight_norm" else one
    for one in MODULES
]

OPERATIONS = [
    *(*LOSSES, *ACTIVATIONS, *NORMS, *CONVOLUTIONS, *EMBEDDINGS, *ATTENTION),
    *(*POOLS, *DROPOUTS, *DISTANCES, *VISION, *MODULES),
]
