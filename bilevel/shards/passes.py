"""The lower pass and the upper gradient of a sharded module, both over all ranks.

Row r of what a rank receives is rank r's gradient of the receiver's shard (``gradient_rows``). With
factors c_r, known before the backward pass, a shard of the sum is ``Σ_r c_r row_r``, and
⟨μ, ∇ℓ_r⟩ is the sum of ``⟨μ_shard, row_r⟩`` over the ranks that hold the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import tree
from bilevel.autodiff import random_state
from bilevel.autodiff.gradient import UpperGradient, as_leaves, dense
from bilevel.lower.gradient_sum import GradientSum
from bilevel.lower.lower_pass import LowerPass, remarked
from bilevel.lower.micro_batch import MicroBatch, PassContext, weighted_batch
from bilevel.problem import Batch, Params, Problem, detached, upper_value
from bilevel.profiling import part
from bilevel.routes.dot import single_loss
from bilevel.shards.collective import Shards
from bilevel.tree import Tree


@part("lower pass")
def lower_pass(
    shards: Shards,
    problem: Problem,
    lower_params: Params,
    upper_params: Params,
    batches: Sequence[Batch],
    direction: Tree | None = None,
) -> LowerPass:
    """Run the micro-batches of a step, of one example each, as the route ``Dot`` does.

    With or without μ the gradient is the same bit for bit.

    Args:
        shards: The ranks.
        problem: A ``ReweightingProblem`` with detached features.
        lower_params: This rank's shards of θ, the module's own.
        upper_params: φ, requiring grad if a mixed product will be asked for.
        batches: This rank's micro-batches.
        direction: μ's local shards, if a mixed product will be asked for.

    Returns:
        The pass, with the local shards of the gradient, and the norm of all of it.

    Raises:
        ValueError: A micro-batch has several examples, or the ranks differ in their number.
    """
    _check_alike(shards, len(batches))
    context = PassContext(problem, lower_params, upper_params, direction is not None, direction)
    total = GradientSum(lower_params, widen=len(batches) * shards.ranks > 1)
    micro_batches: list[MicroBatch] = []
    terms: list[Float[Tensor, " ranks"]] = []
    for batch in batches:
        random = random_state.capture(lower_params)
        with torch.enable_grad():
            params = as_leaves(lower_params)
            losses, weights = single_loss(context, params, batch)
            micro_batches.append(weighted_batch(batch, random, losses, weights))
            factors = torch.cat(shards.gathered(weights.detach()))
            terms.append(_backward(shards, losses.mean(), params, factors, total, direction))
    grads = total.mean(len(batches) * shards.ranks)
    norm, products = _joined(shards, tree.norm(grads), terms)
    if direction is not None:
        micro_batches = [
            replace(micro, dots=_known(product[None]))
            for micro, product in zip(micro_batches, products, strict=True)
        ]
    examples = len(batches) * shards.ranks
    passed = LowerPass(grads, micro_batches, norm, collective=shards, examples=examples)
    return remarked(context, passed)


@part("upper gradient")
def upper_gradient(
    shards: Shards,
    problem: Problem,
    lower_params: Params,
    upper_params: Params,
    batch: Batch,
) -> UpperGradient:
    """Return the upper loss of all ranks, with the local shards of v and all of the direct part.

    Args:
        shards: The ranks.
        problem: The losses.
        lower_params: This rank's shards of θ, the module's own.
        upper_params: φ.
        batch: This rank's part of the upper batch.

    Raises:
        ValueError: The loss is not a scalar, or a rank has no part of the batch.
    """
    sizes = shards.replicas.numbers(shards.upper_examples(batch), "upper gradient")
    if not all(sizes):
        raise ValueError(
            f"upper_batch: the ranks have {sizes} examples; a sharded module needs one at least on "
            "every rank, which calls it: give a larger upper batch, or run fewer ranks"
        )
    total = GradientSum(lower_params, widen=shards.ranks > 1)
    with torch.enable_grad():
        lower, upper = as_leaves(lower_params), as_leaves(upper_params)
        loss, aux = upper_value(problem, lower, upper, batch)
        factors = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        _backward(shards, loss, lower, factors, total, None)
    direct = tree.map(lambda leaf: dense(leaf.grad), upper)
    found = loss.detach(), direct
    like = loss.detach(), upper_params
    joined, _ = shards.replicas.mean("upper gradient", found, sizes[shards.rank], like)
    return UpperGradient(joined[0], total.mean(1.0), joined[1], detached(aux))


def _check_alike(shards: Shards, count: int) -> None:
    counts = shards.replicas.numbers(count, "lower gradient")
    if set(counts) != {count}:
        raise ValueError(
            f"lower_batches: the ranks have {counts} micro-batches of one example each; a sharded "
            "module needs as many on every rank"
        )


def _backward(
    shards: Shards,
    loss: Float[Tensor, ""],
    params: Params,
    factors: Float[Tensor, " ranks"],
    total: GradientSum,
    direction: Tree | None,
) -> Float[Tensor, " ranks"]:
    """Add ``Σ_r factor_r row_r`` to the sum, and return ``⟨direction, row_r⟩`` of these shards.

    Raises:
        ValueError: The loss uses θ beside the module.
    """
    names = tree.names(params)
    index = {name: number for number, name in enumerate(names)}
    along = total.structure.flatten_up_to(direction) if direction is not None else []
    # By rank and leaf, in the order of ``tree.vdot``.
    terms: list[list[list[Tensor]]] = [[[] for _ in names] for _ in factors]

    def receive(name: str, rows: Float[Tensor, "ranks ..."]) -> None:
        place = index[name]
        for rank, row in enumerate(rows):
            if along and along[place] is not None:
                terms[rank][place] = tree.dot_terms(row, along[place])
            total.add_leaf(place, factors[rank], row)

    shards.module.rows.backward(loss, receive)
    used = [name for name, leaf in tree.flatten(params).items() if leaf.grad is not None]
    if used:
        raise ValueError(
            f"Shards: the loss uses {used[0]!r} itself beside the module, of which this rank has a "
            "shard alone; compute it of what the module returns, or use weight_decay"
        )
    flat = [[term for of_leaf in of_rank for term in of_leaf] for of_rank in terms]
    return torch.stack([tree.total(of_rank, like=params) for of_rank in flat])


def _joined(
    shards: Shards, norm: Float[Tensor, ""], terms: Sequence[Float[Tensor, " ranks"]]
) -> tuple[Float[Tensor, ""], Float[Tensor, " micro_batches"]]:
    """Return the norm over all shards, and this rank's products summed over them: one message."""
    mine = torch.cat([norm[None], *(term.to(norm.dtype) for term in terms)])
    rows = torch.stack(shards.gathered(mine))
    products = rows[:, 1:].sum(0).view(len(terms), shards.ranks)
    return torch.linalg.vector_norm(rows[:, 0]), products[:, shards.rank]


def _known(products: Float[Tensor, "1"]) -> Callable[[Tree], Float[Tensor, "1"]]:
    return lambda _: products
