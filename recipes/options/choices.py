"""The options of the weighting and of the hypergradient: a dataclass for each variant.

A variant holds the options that only it reads. A value that the variant fixes is an attribute of
its class, so that the code can read it from every variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from recipes.options.base import MOST_NUMBER, MOST_STEPS, option
from recipes.options.conditions import (
    BOUND_HIGH,
    BOUND_LOW,
    BOUNDED,
    CENTRAL_DIFFERENCE,
    GRADIENT_FEATURE,
    IMPLICIT,
    LABELS,
    MODEL_FEATURE,
    NET,
    NORMALISED,
    ON_TRAIN_FILE,
    ONE_STEP,
    PENALTY,
    PRIOR,
    UNWEIGHTED,
    UPPER_FIRST,
    WEIGHTED,
)

Normalise: TypeAlias = Literal["batch", "table", "none"]
LowerData: TypeAlias = Literal["train", "meta"]


@dataclass(frozen=True, kw_only=True)
class _Unlearned:
    """What a run without a learned weighting trains on."""

    weights_file: str | None = option(
        None,
        "weights.jsonl of an earlier run: train with these weights, fixed",
        only_with=(UNWEIGHTED, ON_TRAIN_FILE),
        on_resume="file",
    )
    lower_data: LowerData = option(
        "train",
        "meta: train on the meta loss itself, plain fine-tuning on the meta set",
        only_with=UNWEIGHTED,
    )


@dataclass(frozen=True, kw_only=True)
class _Bounded:
    """The range of the weights, which belong to examples of the training file."""

    weights_file: ClassVar[None] = None
    lower_data: ClassVar[Literal["train"]] = "train"

    bound: Literal["clip", "clamp", "sigmoid", "softplus", "leaky-relu", "relu", "none"] = option(
        "sigmoid",
        "map from raw weights to weights; clip lets a weight that was pushed to an end come back, "
        "clamp (DreamPRM-1.5) does not",
        only_with=(WEIGHTED, BOUNDED),
    )
    bound_low: float = option(
        0.0,
        "lower end of the range",
        least=-MOST_NUMBER,
        most=MOST_NUMBER,
        only_with=(WEIGHTED, BOUNDED, BOUND_LOW),
    )
    bound_high: float = option(
        2.0,
        "upper end of the range",
        least=-MOST_NUMBER,
        most=MOST_NUMBER,
        only_with=(WEIGHTED, BOUNDED, BOUND_HIGH),
    )


@dataclass(frozen=True, kw_only=True)
class _Normalised:
    """The examples over which weights have mean 1."""

    normalise: Normalise = option(
        "batch",
        "mean 1 within the batch, over the whole table or weights file, or no normalisation",
        only_with=NORMALISED,
    )


@dataclass(frozen=True, kw_only=True)
class _Prior:
    """The initial weight of instances."""

    prior: float = option(
        1.0,
        "weight of every instance at the start, and where decay pulls",
        least=-MOST_NUMBER,
        most=MOST_NUMBER,
        only_with=(WEIGHTED, PRIOR),
    )


class _Featureless:
    """A weighting that reads no features of the examples."""

    features: ClassVar[tuple[str, ...]] = ()
    reference_features: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class NetOptions(_Prior, _Normalised, _Bounded):
    """Instance Net: weights from features of the steps."""

    kind: ClassVar[Literal["net"]] = "net"

    centre: bool = option(
        True,
        "subtract the mean of the batch from what Instance Net says of its examples",
        only_with=(WEIGHTED, NET),
    )
    features: tuple[str, ...] = option(
        ("label", "p_label", "p_plus"),
        "inputs of Instance Net: of each step p_plus, p_minus, label, p_label, loss; of the "
        "example steps (how many), length (tokens), domain, gradient (its loss's, projected)",
        only_with=(WEIGHTED, NET),
    )
    gradient_features: int = option(
        32,
        "principal components of the gradients of the examples' losses under the initial model "
        "that Instance Net reads",
        least=1,
        most=1024,
        only_with=(WEIGHTED, NET, GRADIENT_FEATURE),
    )
    reference_features: bool = option(
        True,
        "give Instance Net the same features by the PRM as it was at the start, too: what the "
        "model said of a label before it could memorise it",
        only_with=(WEIGHTED, NET, MODEL_FEATURE),
    )
    hidden: int = option(
        10, "units per hidden layer of Instance Net", least=1, most=4096, only_with=(WEIGHTED, NET)
    )
    layers: int = option(
        1, "hidden layers of Instance Net", least=1, most=32, only_with=(WEIGHTED, NET)
    )


@dataclass(frozen=True, kw_only=True)
class TableOptions(_Featureless, _Prior, _Normalised, _Bounded):
    """Instance Table: a weight for every example."""

    kind: ClassVar[Literal["table"]] = "table"


@dataclass(frozen=True, kw_only=True)
class DomainOptions(_Featureless, _Bounded):
    """Domain Table: a weight for every domain, which starts at 1."""

    kind: ClassVar[Literal["domain"]] = "domain"
    normalise: ClassVar[Literal["batch"]] = "batch"
    prior: ClassVar[float] = 1.0


@dataclass(frozen=True, kw_only=True)
class LabelsOptions(_Featureless):
    """Learned labels: a soft label for every step, which starts at the given one."""

    kind: ClassVar[Literal["labels"]] = "labels"
    weights_file: ClassVar[None] = None
    lower_data: ClassVar[Literal["train"]] = "train"
    normalise: ClassVar[Literal["none"]] = "none"
    bound: ClassVar[Literal["sigmoid"]] = "sigmoid"

    label_trust: float = option(
        0.9,
        "chance that a given label is right, which learned labels start from: 0.9 makes + 0.9 and "
        "- 0.1; above 0.5 and below 1",
        least=0.5,
        most=1,
        only_with=(WEIGHTED, LABELS),
    )


@dataclass(frozen=True, kw_only=True)
class NoWeighting(_Featureless, _Normalised, _Unlearned):
    """No weighting is learned: all weights are 1, or those of a file."""

    kind: ClassVar[Literal["none"]] = "none"


BoundedOptions: TypeAlias = NetOptions | TableOptions | DomainOptions
LearnedOptions: TypeAlias = BoundedOptions | LabelsOptions
WeightingOptions: TypeAlias = LearnedOptions | NoWeighting


@dataclass(frozen=True, kw_only=True)
class OneStepOptions:
    """The hypergradient through the last lower step of a window."""

    kind: ClassVar[Literal["one-step"]] = "one-step"

    route: Literal[
        "auto", "dot", "ghost", "per-example", "jvp", "reverse", "central-difference"
    ] = option("auto", "how the mixed second-order product is computed", only_with=ONE_STEP)
    difference_radius: float | None = option(
        None,
        "length of the shift of the parameters (central-difference); null: from their size and "
        "precision; Betty's, and so DreamPRM-1.5's, is 0.01",
        least=0,
        most=MOST_NUMBER,
        only_with=CENTRAL_DIFFERENCE,
    )
    order: Literal["upper-first", "lower-first"] = option(
        "upper-first",
        "evaluate the meta gradient before or after the lower step",
        only_with=ONE_STEP,
    )
    direction_decay: float = option(
        0.9,
        "exponential average of the meta gradient; 0: none",
        least=0,
        most=1,
        only_with=ONE_STEP,
    )
    upper_gradient_every: int = option(
        1,
        "upper steps that share a meta gradient: the first of them computes it, the others cost no "
        "more than plain training",
        least=1,
        most=MOST_STEPS,
        only_with=(ONE_STEP, UPPER_FIRST),
    )


@dataclass(frozen=True, kw_only=True)
class UnrolledOptions:
    """The hypergradient through all lower steps of a window."""

    kind: ClassVar[Literal["unrolled"]] = "unrolled"


@dataclass(frozen=True, kw_only=True)
class ImplicitOptions:
    """The hypergradient at the end of a window, as if the lower level were solved."""

    kind: ClassVar[Literal["implicit"]] = "implicit"

    linear_solver: Literal["nystrom", "cg", "neumann"] = option(
        "nystrom", "of the system with the Hessian of the training loss", only_with=IMPLICIT
    )
    solver_iterations: int = option(
        10,
        "its iterations; nystrom: directions, which are kept in memory",
        least=1,
        most=10_000,
        only_with=IMPLICIT,
    )
    damping: float = option(
        0.1, "added to the Hessian's diagonal", least=0, most=MOST_NUMBER, only_with=IMPLICIT
    )


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """The hypergradient by a penalty on a second copy of the model."""

    kind: ClassVar[Literal["penalty"]] = "penalty"

    penalty_strength: float = option(
        10.0,
        "how strongly the copy is held to the training loss; its error falls with 1 / this",
        least=0,
        most=MOST_NUMBER,
        only_with=PENALTY,
    )


HypergradientOptions: TypeAlias = (
    OneStepOptions | UnrolledOptions | ImplicitOptions | PenaltyOptions
)
