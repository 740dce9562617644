"""The optimizer's step in place, and its derivative, part by part (``parts``).

An elementwise rule commutes with cutting, so the optimizer itself takes the step, on a part at a
time, and its result is copied back: the bits are those of ``optimizer.update``. ``Adam`` and
``AdamW`` take torch's fused kernel instead, twelve times as fast, which rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff.torch_private import foreach_mul
from bilevel.lower.steps import Point
from bilevel.optimizers.base import OptimizerState, clip_scale
from bilevel.optimizers.elementwise import ElementwiseOptimizer
from bilevel.optimizers.groups import ONLY, of_group
from bilevel.optimizers.point import Leaves, column
from bilevel.resident.adam import FusedAdam
from bilevel.resident.memory import is_dense
from bilevel.resident.parts import Cut, parts, reached
from bilevel.resident.pieces import Gathered, Piece
from bilevel.tree import Tree


class _Columns(NamedTuple):
    """Leaves in the parameters' order, and their names."""

    names: list[str]
    params: Leaves
    first: Leaves
    second: Leaves


@torch.no_grad()
def step_(
    optimizer: ElementwiseOptimizer,
    point: Point,
    grads: Tree,
    norm: Float[Tensor, ""],
    *,
    weight: float | None = None,
    slopes: bool = False,
    usual: Bool[Tensor, ""] | None = None,
) -> Point:
    """Take a step in place, and return the point after it, which has the same tensors.

    Args:
        optimizer: Takes the step.
        point: θ and the optimizer's state; changed.
        grads: The gradient like θ, None leaves being left out; with ``slopes`` changed.
        norm: The norm of ``weight`` · ``grads``, for the clip.
        weight: What the gradient is multiplied by; None: by nothing.
        slopes: Whether ``grads`` becomes ``(∂θ'/∂g) grads``, in place, with g the weighted gradient
            and the clip scale a constant. The derivative is diagonal, so that
            ``⟨(∂θ'/∂g)ᵀ v, grads⟩ = ⟨v, (∂θ'/∂g) grads⟩`` for the v that is still to come.
        usual: If it is False, θ and the moments stay as they are; None: it is True.
    """
    state: OptimizerState = point.optimizer_state
    columns, structure = _columns(point)
    raw: Leaves = structure.flatten_up_to(grads)
    clip = None
    if optimizer.max_norm is not None:
        clip = clip_scale(norm, optimizer.max_norm)
    kernel = FusedAdam.of(optimizer, int(state.steps) + 1)
    plain = replace(optimizer, max_norm=None)
    moments = [moment for moment, kept in zip(columns[2:], state[1:], strict=True) if kept]
    for part in parts([columns.params, raw, *moments]):
        seen = _seen(part, raw, weight, optimizer.state_dtype, clip)
        given = (part, columns, raw, seen, clip, slopes, usual)
        if kernel is not None and _alike(part, columns, raw):
            _fused(kernel, optimizer, int(state.steps), weight, *given)
        else:
            _by_rule(plain, state.steps, *given)
    return Point(point.lower_params, state._replace(steps=state.steps + 1))


@torch.no_grad()
def step_in_pieces_(
    optimizer: ElementwiseOptimizer,
    point: Point,
    gathered: Gathered,
    norm: Float[Tensor, ""],
    weight: float,
    *,
    slopes: bool,
) -> Point | None:
    """Take a step in place, like ``step_``, of a gradient in pieces.

    The numbers of operations are those of pieces, not of leaves.

    Args:
        optimizer: Takes the step.
        point: θ and the optimizer's state; changed.
        gathered: The gradient; changed.
        norm: The norm of ``weight`` · gradient, on the host.
        weight: What the gradient is multiplied by.
        slopes: See ``step_``.

    Returns:
        The point after the step; None, with nothing changed, where only ``step_`` can take it.
    """
    state: OptimizerState = point.optimizer_state
    count = int(state.steps)
    kernel = FusedAdam.of(optimizer, count + 1)
    scale = weight
    if optimizer.max_norm is not None:
        scale *= float(clip_scale(norm, optimizer.max_norm))
    if kernel is None or abs(scale) < _LEAST_SCALE:
        return None
    columns, _ = _columns(point)
    raw = gathered.views(columns.params)
    cuts = [Cut(leaf) for piece in gathered.pieces for leaf in piece.leaves]
    groups = _by_group(optimizer, count, cuts, columns.names)
    coupled = not kernel.decoupled and any(decay for _, decay in groups)
    turned = any(not leaf.is_contiguous() for leaf in _of(cuts, columns.params))
    if coupled or turned or not all(_alike([cut], columns, raw) for cut in cuts):
        return None
    rates = {cut.leaf: lr for (lr, _), some in groups.items() for cut in some}
    if scale != 1.0:
        for piece in gathered.pieces:
            piece.flat.mul_(scale)
    for (lr, decay), some in groups.items():
        params, first, second, grads = (
            _of(some, leaves) for leaves in (columns.params, columns.first, columns.second, raw)
        )
        kernel.step_(params, grads, first, second, lr, decay)
    for piece in gathered.pieces if slopes else ():
        some = [Cut(leaf) for leaf in piece.leaves]
        first, second = _of(some, columns.first), _of(some, columns.second)
        # All leaves of a piece are of one group of rates.
        kernel.slope_of_piece_(piece.flat, first, second, -rates[piece.leaves[0]] / weight)
    return Point(point.lower_params, state._replace(steps=state.steps + 1))


# With less, a gradient times weight and clip could lose digits that the direction still needs.
_LEAST_SCALE = 2.0**-40


def group_names(optimizer: ElementwiseOptimizer, params: Tree) -> list[str]:
    """Return the group of rates of each leaf, in order."""
    names = tree.names(params, none_is_leaf=True)
    return [optimizer.group(name) if optimizer.group else ONLY for name in names]


@torch.no_grad()
def predict_(optimizer: ElementwiseOptimizer, point: Point, v: Tree) -> None:
    """Turn v into μ in place, before the gradient is known: ``predicted_grads_vjp``."""
    columns, structure = _columns(point)
    bars: Leaves = structure.flatten_up_to(v)
    steps = point.optimizer_state.steps
    for part in parts([columns.params, bars]):
        if not any(reached(cut, bars) for cut in part):
            continue  # μ is zero where v is.
        state, params = _subtree(part, columns, steps)
        given = {columns.names[cut.leaf]: cut.of(bars) for cut in part}
        _copy(part, bars, optimizer.predicted_grads_vjp(state, params, given), columns.names)


@torch.no_grad()
def predict_in_pieces(optimizer: ElementwiseOptimizer, point: Point, v: Gathered) -> Gathered:
    """Return μ of v before the gradient is known, like ``predict_``; v is freed piece by piece."""
    columns, _ = _columns(point)
    found = Gathered(v.keys, [])
    while v.pieces:
        piece = v.pieces.pop(0)
        # The rule is elementwise: a piece is one parameter, of which it sees shape and group alone.
        name, cuts = columns.names[piece.leaves[0]], [Cut(leaf) for leaf in piece.leaves]
        moments = [
            {name: torch.cat([leaf.reshape(-1) for leaf in _of(cuts, column)])} if kept else None
            for column, kept in zip(columns[2:], optimizer.predicts_from, strict=True)
        ]
        state = OptimizerState(point.optimizer_state.steps, *moments)
        given: Any = {name: piece.flat}
        predicted: Any = optimizer.predicted_grads_vjp(state, given, given)
        found.pieces.append(Piece(piece.leaves, predicted[name]))
    return found


def _columns(point: Point) -> tuple[_Columns, Any]:
    leaves, structure = optree.tree_flatten(point.lower_params, none_is_leaf=True)
    state = point.optimizer_state
    moments = [column(structure, moment, len(leaves)) for moment in state[1:]]
    names = tree.names(point.lower_params, none_is_leaf=True)
    return _Columns(names, leaves, *moments), structure


def _seen(
    part: Sequence[Cut],
    raw: Leaves,
    weight: float | None,
    dtype: torch.dtype | None,
    clip: Tensor | None,
) -> dict[Cut, Tensor]:
    """Return the gradients of a part as the rule sees them, on a device in a few kernels."""
    grads = _of(part, raw)
    together = len({grad.dtype for grad in grads}) == 1 and not any(
        grad.is_cpu or tree.is_sharded(grad) for grad in grads
    )
    if clip is not None and weight is None and dtype is None and together:
        grads = list(foreach_mul(grads, clip.to(grads[0])))
        return dict(zip(part, grads, strict=True))
    return {cut: _scaled(grad, weight, dtype, clip) for cut, grad in zip(part, grads, strict=True)}


def _scaled(
    grad: Tensor, weight: float | None, dtype: torch.dtype | None, clip: Tensor | None
) -> Tensor:
    """Return the gradient as the rule sees it, with the roundings of the functional step."""
    scaled = grad
    if weight is not None:
        scaled = torch.zeros_like(grad) if weight == 0.0 else grad * weight
    scaled = scaled.to(dtype or grad.dtype)
    if clip is None:
        return scaled
    number = _number(clip, scaled)
    return scaled * number if scaled is grad else scaled.mul_(number)


def _number(scale: Tensor, like: Tensor) -> float | Tensor:
    """Return a scalar in the precision of a tensor, without a transfer to a device."""
    scale = scale.to(like)
    return float(scale) if scale.is_cpu else scale


def _subtree(part: Sequence[Cut], columns: _Columns, steps: Tensor) -> tuple[OptimizerState, Tree]:
    """Return the state and the parameters of a part, by name."""
    found: list[Any] = []
    for leaves in columns[1:]:
        named = {columns.names[cut.leaf]: cut.of(leaves) for cut in part}
        found.append(None if all(leaf is None for leaf in named.values()) else named)
    params, first, second = found
    return OptimizerState(steps, first, second), params


def _copy(
    part: Sequence[Cut],
    leaves: Leaves,
    new: Any,
    names: Sequence[str],
    usual: Bool[Tensor, ""] | None = None,
) -> None:
    for cut in part:
        old = cut.of(leaves)
        if old is not None:
            found = new[names[cut.leaf]]
            old.copy_(found if usual is None else torch.where(usual, found.to(old.dtype), old))


def _by_rule(
    optimizer: ElementwiseOptimizer,
    steps: Tensor,
    part: Sequence[Cut],
    columns: _Columns,
    raw: Leaves,
    seen: dict[Cut, Tensor],
    clip: Tensor | None,
    slopes: bool,
    usual: Bool[Tensor, ""] | None,
) -> None:
    """Take the step of a part by the optimizer's own ``update``."""
    names = columns.names
    state, params = _subtree(part, columns, steps)
    grads = {names[cut.leaf]: seen[cut] for cut in part}
    new_params, new_state = optimizer.update(grads, state, params)
    if slopes:
        along = {names[cut.leaf]: cut.of(raw) for cut in part}
        moved: Any = optimizer.grads_vjp(grads, state, params, along)
        if clip is not None:
            moved = {name: leaf * _number(clip, leaf) for name, leaf in moved.items()}
        _copy(part, raw, moved, names)
    for leaves, new in zip(columns[1:], (new_params, *new_state[1:]), strict=True):
        _copy(part, leaves, new, names, usual)


def _alike(part: Sequence[Cut], columns: _Columns, raw: Leaves) -> bool:
    """Return whether the fused kernel, which looks at neither dtypes nor strides, may be used."""
    dtypes = set()
    for cut in part:
        param, first, second, grad = (c[cut.leaf] for c in (*columns[1:], raw))
        assert param is not None
        assert grad is not None
        for moment in (first, second):
            assert moment is not None
            if moment.stride() != param.stride():
                return False
            dtypes.add(moment.dtype)
        if not is_dense(param):
            return False
        dtypes |= {param.dtype, grad.dtype}
    return len(dtypes) == 1


def _fused(
    kernel: FusedAdam,
    optimizer: ElementwiseOptimizer,
    count: int,
    weight: float | None,
    part: Sequence[Cut],
    columns: _Columns,
    raw: Leaves,
    seen: dict[Cut, Tensor],
    clip: Tensor | None,
    slopes: bool,
    usual: Bool[Tensor, ""] | None,
) -> None:
    """Take the step of a part by the fused kernel, group by group."""
    groups = _by_group(optimizer, count, part, columns.names)
    for (lr, decay), cuts in groups.items():
        params, first, second, grads = (
            _of(cuts, leaves) for leaves in (columns.params, columns.first, columns.second, raw)
        )
        laid_out = [
            one if one.stride() == param.stride() else torch.empty_like(param).copy_(one)
            for one, param in zip((seen[cut] for cut in cuts), params, strict=True)
        ]
        used = kernel.step_(params, laid_out, first, second, lr, decay, usual)
        if slopes:
            scale = 1.0 if clip is None else float(clip)
            if decay and not kernel.decoupled:
                kernel.slope_(grads, used, first, second, -lr * scale)
                continue
            ratio = scale if weight is None else weight * scale
            some = [stretch for cut in cuts for stretch in reached(cut, raw)]
            if some:
                moments = _of(some, columns.first), _of(some, columns.second)
                kernel.slope_(_of(some, raw), ratio, *moments, -lr * scale)


def _of(cuts: Sequence[Cut], column: Leaves) -> list[Tensor]:
    return [leaf for cut in cuts if (leaf := cut.of(column)) is not None]


def _by_group(
    optimizer: ElementwiseOptimizer, count: int, part: Sequence[Cut], names: Sequence[str]
) -> dict[tuple[float, float], list[Cut]]:
    """Return the cuts of a part by (learning rate, weight decay) of the step after so many."""
    here = dict.fromkeys(names[cut.leaf] for cut in part)
    groups = {n: optimizer.group(n) if optimizer.group else ONLY for n in here}
    found: dict[tuple[float, float], list[Cut]] = {}
    for cut in part:
        name = names[cut.leaf]
        lr = of_group(optimizer, "lr", optimizer.lr, groups[name])
        decays = optimizer.decay_mask is None or optimizer.decay_mask(name)
        decay = of_group(optimizer, "weight_decay", optimizer.weight_decay, groups[name])
        key = float(lr(count) if callable(lr) else lr), float(decay) if decays else 0.0
        found.setdefault(key, []).append(cut)
    return found
