"""Problems that several tests share and that the zoo does not have."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from bilevel import BilevelProblem
from tests.bilevel.zoo import Case, Encoder, Language, make, tokens
from tests.oracles import half_squares


def total_problem(ridge: float) -> BilevelProblem:
    """½ Σ s_i (x_i·w − y_i)² + ridge/2 ‖w‖² below, ½ ‖X_v w − y_v‖² above."""
    return BilevelProblem(
        lambda lower, upper, batch: (
            (upper["s"] * half_squares(lower, batch)).sum() + ridge / 2 * lower["w"].square().sum()
        ),
        lambda lower, upper, batch: half_squares(lower, batch).sum(),
    )


def weights_from_losses(upper, batch, features):
    """An instance net on the loss, whose own layer norm is differentiated twice."""
    hidden = torch.tanh(torch.outer(features["losses"], upper["table"]))
    return functional.layer_norm(hidden, (5,)) @ upper["table"] * upper["scale"] + 1.0


class Shifted(nn.Module):
    """φ under everything: a learned input noise scale below layer norm, attention and dropout."""

    def __init__(self):
        super().__init__()
        self.encoder, self.language = Encoder(), Language(dropout=0.3)

    def forward(self, tokens, shift):
        x = self.language.block(self.language.embed(tokens) + shift)
        return self.encoder.norm(x[:, -1, :6] * shift[0]) @ self.encoder.out


def below_the_network() -> Case:
    """φ shifts the embeddings of a language model and sets a ridge: no per-example structure."""
    torch.manual_seed(3)
    module = Shifted().double()
    case = make(Encoder(), tokens)
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}

    def loss(lower, upper, batch, ridge):
        shift = torch.cat([upper["table"], upper["table"][:3]]) * upper["scale"]
        logits = functional_call(module, lower, (batch["inputs"]["tokens"], shift))
        decay = ridge * torch.exp(upper["scale"]) * lower["encoder.out"].square().sum()
        return functional.cross_entropy(logits, batch["labels"]) + decay

    problem = BilevelProblem(
        lambda lower, upper, batch: loss(lower, upper, batch, 0.1),
        lambda lower, upper, batch: loss(lower, upper, batch, 0.0),
        batch_size=lambda batch: len(batch["labels"]),
    )
    return replace(case, problem=problem, params=params)
