"""The problem of the benchmark: a decoder, weights of its training sequences, a clean upper batch.

In nine of ten cases a token is followed by its fixed successor, which in half of the lower
sequences is a wrong one. The parameters have taken some steps, so that the optimizer's moments are
not cold. From a cold state the exact hypergradient of an adaptive optimizer is almost 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from bilevel import AdamW, OptimizerState, ReweightingProblem, tree
from recipes.evidence.bench.decoder import Decoder, Sizes

Batch = dict[str, Tensor]

LR = 1e-3


@dataclass(frozen=True)
class Case:
    """A point (θ, φ, optimizer state), lower batches for a window, and an upper batch."""

    sizes: Sizes
    model: Decoder
    optimizer: AdamW
    lower: dict[str, Tensor]
    upper: dict[str, Tensor]
    state: OptimizerState
    batches: tuple[Batch, ...]
    upper_batch: Batch

    @property
    def problem(self) -> ReweightingProblem[Mapping[str, Tensor], dict[str, Tensor], Batch]:
        """Return the problem with weights 2 σ(raw) and mean losses over a sequence's tokens."""
        return ReweightingProblem(self._losses, _weights, self.upper_loss)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of θ."""
        return self.lower["head.weight"].dtype

    @property
    def name(self) -> str:
        """The precision and the batch, which identify a case within a run."""
        return f"{str(self.dtype).removeprefix('torch.')}, {self.batch}"

    @property
    def batch(self) -> str:
        """The number of examples and their length."""
        return f"{self.sizes.examples} x {self.sizes.tokens}"

    @property
    def parameter_bytes(self) -> int:
        """The size of θ in bytes."""
        return tree_bytes(self.lower)

    @property
    def state_bytes(self) -> int:
        """The size of θ and of the optimizer's moments in bytes."""
        return tree_bytes((self.lower, self.state))

    def singles(self, batch: Batch) -> list[Batch]:
        """Return the batch as micro-batches of one example."""
        return [
            {name: value[index : index + 1] for name, value in batch.items()}
            for index in range(self.sizes.examples)
        ]

    def cast(self, dtype: torch.dtype) -> Case:
        """Return the same case in another precision.

        With 16-bit θ the optimizer's moments, its arithmetic and φ remain in float32. A cast to
        float64 changes no number, and the optimizer's arithmetic is then float64, too.
        """
        wide = torch.promote_types(dtype, torch.float32)
        moments = [tree.map(lambda leaf: leaf.to(wide), moment) for moment in self.state[1:]]
        return replace(
            self,
            optimizer=replace(self.optimizer, state_dtype=None if wide == dtype else wide),
            lower={name: leaf.to(dtype) for name, leaf in self.lower.items()},
            upper={name: leaf.to(wide) for name, leaf in self.upper.items()},
            state=OptimizerState(self.state.steps, *moments),
        )

    def _losses(self, lower: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, None]:
        tokens = batch["tokens"]
        logits: Tensor = functional_call(self.model, dict(lower), (tokens[:, :-1],))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return losses.unflatten(0, (len(tokens), -1)).mean(-1), None

    def upper_loss(self, lower: Mapping[str, Tensor], upper: Any, batch: Batch) -> Tensor:
        """Return the unweighted mean loss, which does not depend on φ."""
        return self._losses(lower, batch)[0].mean()


def _weights(upper: dict[str, Tensor], batch: Batch, features: None) -> Tensor:
    return 2.0 * torch.sigmoid(upper["raw"][batch["instance"]])


def tree_bytes(values: Any) -> int:
    """Return the size of all tensors in a tree in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(values))


def make_case(sizes: Sizes, steps: int, warm_up: int = 64) -> Case:
    """Return a float32 case whose window has ``steps`` batches, the same one at every call.

    ``warm_up`` steps precede it. After only 10, a few tokens have not occurred and their second
    moments are 0. Adam's derivatives there are thousands of times larger than elsewhere, and a few
    entries dominate the errors in bfloat16 (see ``bilevel.routes``).

    Raises:
        ValueError: The window needs more instances than there are.
    """
    if steps * sizes.examples > sizes.instances:
        raise ValueError(
            f"a window of {steps} batches of {sizes.examples} needs {steps * sizes.examples} "
            f"instances, found {sizes.instances}"
        )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(sizes)
    right, wrong = (torch.randperm(sizes.vocabulary, generator=generator) for _ in range(2))
    half = sizes.instances // 2
    tokens = torch.cat(
        [
            _sequences(sizes, half, right, generator),
            _sequences(sizes, sizes.instances - half, wrong, generator),
        ]
    )
    order = torch.randperm(sizes.instances, generator=generator)
    batches = tuple(
        {"tokens": tokens[rows], "instance": rows}
        for rows in order[: max(steps, 1) * sizes.examples].split(sizes.examples)
    )
    optimizer = AdamW(LR)
    lower = {name: leaf.detach() for name, leaf in model.named_parameters()}
    case = Case(
        sizes=sizes,
        model=model,
        optimizer=optimizer,
        lower=lower,
        upper={"raw": 0.5 * torch.randn(sizes.instances, generator=generator)},
        state=optimizer.init(lower),
        batches=batches,
        upper_batch={"tokens": _sequences(sizes, sizes.examples, right, generator)},
    )
    warm = order[torch.randint(sizes.instances, (warm_up, sizes.examples), generator=generator)]
    return _warmed(case, [{"tokens": tokens[rows], "instance": rows} for rows in warm])


def _sequences(sizes: Sizes, count: int, successor: Tensor, generator: torch.Generator) -> Tensor:
    """Return random token ids [count, tokens + 1]."""
    columns = [torch.randint(sizes.vocabulary, (count,), generator=generator)]
    for _ in range(sizes.tokens):
        stray = torch.randint(sizes.vocabulary, (count,), generator=generator)
        follows = torch.rand(count, generator=generator) < 0.9
        columns.append(torch.where(follows, successor[columns[-1]], stray))
    return torch.stack(columns, dim=1)


def _warmed(case: Case, batches: Sequence[Batch]) -> Case:
    for batch in batches:
        lower, state = plain_step(case, case.lower, case.state, [batch])
        case = replace(case, lower=lower, state=state)
    return case


def plain_step(
    case: Case, lower: dict[str, Tensor], state: OptimizerState, micro_batches: Sequence[Batch]
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Take an ordinary lower step, one half of the floor."""
    grads = plain_gradients(case, lower, micro_batches)
    with torch.no_grad():
        new: tuple[dict[str, Tensor], OptimizerState] = case.optimizer.update(grads, state, lower)
    return new


def plain_gradients(
    case: Case, lower: dict[str, Tensor], micro_batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Return ∇_θ of the weighted mean loss, accumulated over micro-batches by ``backward``."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in lower.items()}
    for batch in micro_batches:
        (case.problem.lower_loss(leaves, case.upper, batch) / len(micro_batches)).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def plain_upper_gradient(case: Case, lower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ∇_θ of the upper loss, the other half of the floor."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in lower.items()}
    loss = case.upper_loss(leaves, case.upper, case.upper_batch)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))
