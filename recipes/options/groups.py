"""Groups of the options of a training run, and the conditions under which a run reads them.

A choice (the weighting, the hypergradient) is one of several dataclasses that hold the options
that only it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from recipes.options.base import Condition, option

# Conditions, in the order in which refusals are reported. They see all options by flat name.


def is_weighted(given: Any) -> bool:
    """Whether weights are learned."""
    return bool(given.weighting != "none")


def has_meta_loss(given: Any) -> bool:
    """Whether the loss on the meta set is computed."""
    return is_weighted(given) or given.lower_data == "meta"


def is_evaluated(given: Any) -> bool:
    """Whether candidates are scored at the end."""
    return given.dev_file is not None or given.test_file is not None


def _reads_the_model(given: Any) -> bool:
    from weighting import is_model_feature  # imports torch: not for --help

    return any(is_model_feature(name) for name in given.features)


WEIGHTED = Condition(is_weighted, ("weighting",), "use --weighting net, table or domain")
META_LOSS = Condition(
    has_meta_loss, ("weighting", "lower_data"), "use a weighting or --lower-data meta"
)
BOUND_LOW = Condition(
    lambda given: given.bound in ("clip", "clamp"),
    ("bound",),
    "use --bound clip or clamp",
    shown="clip, clamp",
)
BOUND_HIGH = Condition(
    lambda given: given.bound in ("clip", "clamp", "sigmoid"),
    ("bound",),
    "use --bound clip, clamp or sigmoid",
    shown="clip, clamp, sigmoid",
)
UPPER_COSINE = Condition(
    lambda given: given.upper_schedule == "cosine",
    ("upper_schedule",),
    "use --upper-schedule cosine",
    shown="cosine",
)
UPPER_STEP = Condition(
    lambda given: given.upper_schedule == "step",
    ("upper_schedule",),
    "use --upper-schedule step",
    shown="step",
)
PRIOR = Condition(
    lambda given: given.weighting in ("net", "table"),
    ("weighting",),
    "use --weighting net or table",
    shown="net, table",
)
NORMALISED = Condition(
    lambda given: given.weighting in ("net", "table") or given.weights_file is not None,
    ("weighting", "weights_file"),
    "use --weighting net or table, or --weights-file",
    shown="net, table, weights file",
)
NET = Condition(lambda given: given.weighting == "net", ("weighting",), "use --weighting net")
MODEL_FEATURE = Condition(
    _reads_the_model, ("features",), "use a feature that depends on the model"
)
UPPER_ADAM = Condition(
    lambda given: given.upper_optimizer != "sgd",
    ("upper_optimizer",),
    "use --upper-optimizer adam or lazy-adam",
)
CENTRAL_DIFFERENCE = Condition(
    lambda given: given.route == "central-difference",
    ("route",),
    "use --route central-difference",
)
ONE_STEP = Condition(
    lambda given: given.hypergradient == "one-step",
    ("hypergradient",),
    "use --hypergradient one-step",
    shown="one-step",
)
IMPLICIT = Condition(
    lambda given: given.hypergradient == "implicit",
    ("hypergradient",),
    "use --hypergradient implicit",
    shown="implicit",
)
PENALTY = Condition(
    lambda given: given.hypergradient == "penalty",
    ("hypergradient",),
    "use --hypergradient penalty",
    shown="penalty",
)
UNWEIGHTED = Condition(
    lambda given: given.weighting == "none",
    ("weighting",),
    "use --weighting none",
    shown="weighting none",
)
ON_TRAIN_FILE = Condition(
    lambda given: given.lower_data == "train", ("lower_data",), "use --lower-data train"
)
AGGREGATED = Condition(
    lambda given: has_meta_loss(given) or is_evaluated(given),
    ("weighting", "dev_file", "test_file"),
    "give candidates to score",
)
SCORED = Condition(
    lambda given: is_weighted(given) or is_evaluated(given),
    ("weighting", "dev_file", "test_file"),
    "give candidates to score",
)
META_AND_TEST = Condition(
    lambda given: has_meta_loss(given) and given.test_file is not None,
    ("weighting", "meta_file", "test_file"),
    "give --meta-file and --test-file",
)
FROM_MODEL = Condition(
    lambda given: given.init_from is None, ("init_from",), "use --init-from none"
)
LOWER_COSINE = Condition(
    lambda given: given.lower_schedule == "cosine",
    ("lower_schedule",),
    "use --lower-schedule cosine",
    shown="cosine",
)
LOWER_STEP = Condition(
    lambda given: given.lower_schedule == "step",
    ("lower_schedule",),
    "use --lower-schedule step",
    shown="step",
)
SAVED = Condition(lambda given: given.save_every > 0, ("save_every",), "use --save-every 1 or more")


@dataclass(frozen=True, kw_only=True)
class LowerLevel:
    """The lower level: which parameters of the model are trained, and how."""

    freeze: tuple[str, ...] = option(
        (), "name prefixes of modules that are not trained, for example vision_tower"
    )
    steps: int = option(300, "lower-level optimizer steps", least=0)
    batch_size: int = option(32, "examples per micro-batch", least=1)
    accumulation: int = option(1, "micro-batches per lower step", least=1)
    lr: float = option(5e-4, "peak learning rate of AdamW", name="lower_lr")
    betas: tuple[float, float] = option(
        (0.9, 0.98), "decay rates of Adam's moments", name="lower_betas"
    )
    weight_decay: float = option(0.01, "decoupled weight decay", name="lower_weight_decay", least=0)
    warmup: float = option(
        0.05,
        "share of the steps with linear warm-up",
        name="lower_warmup",
        only_with=LOWER_COSINE,
    )
    schedule: Literal["cosine", "step", "constant"] = option(
        "cosine",
        "cosine: warm-up, then down to 0; step: times --lower-gamma every --lower-step-size "
        "steps; constant: the peak at every step",
        name="lower_schedule",
    )
    step_size: int = option(
        1000,
        "steps between drops of the learning rate",
        name="lower_step_size",
        least=1,
        only_with=LOWER_STEP,
    )
    gamma: float = option(0.95, "factor of each drop", name="lower_gamma", only_with=LOWER_STEP)
    max_norm: float | None = option(
        1.0, "global-norm clip of the gradient; null: none", name="lower_max_norm"
    )
    loss: Literal["cross-entropy", "squared"] = option(
        "cross-entropy",
        "loss of a step: squared is the distance from soft labels of DreamPRM 1.0",
        name="lower_loss",
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run itself: what it logs and saves, and how it goes on."""

    log_every: int = option(10, "steps between lines of log.jsonl", least=1, on_resume="free")
    save_every: int = option(
        0, "lower steps between checkpoints; 0: none", least=0, on_resume="free"
    )
    keep_checkpoints: int = option(
        2,
        "how many of the newest checkpoints to keep; 0: all",
        least=0,
        only_with=SAVED,
        on_resume="free",
    )
    resume: str | None = option(
        None,
        "directory of an interrupted run: go on from its newest checkpoint, with the options of "
        "its args.yaml; or one of its checkpoints, RUN/checkpoints/step-N",
        on_resume="free",
    )
    on_trouble: Literal["raise", "skip", "rollback"] = option(
        "raise",
        "what a loss, gradient, hypergradient, weight or parameter that is not finite, or an "
        "exploding hypergradient, leads to: end the run before that step, leave the step out, or "
        "return to the last checkpoint of --save-every and go on with the data",
        on_resume="free",
    )
    progress: bool = option(True, "show a progress bar", on_resume="free")


@dataclass(frozen=True, kw_only=True)
class TrustedData:
    """Data whose outcomes are trusted: those of the upper level and of the evaluation."""

    meta_file: str | None = option(
        None,
        "JSONL with `correct`: solutions that trusted the answer",
        only_with=META_LOSS,
        on_resume="file",
    )
    dev_file: str | None = option(
        None, "candidates that may be looked at while tuning", on_resume="free"
    )
    test_file: str | None = option(
        None, "candidates that are scored once, at the end", on_resume="free"
    )
    sanity_check: bool = option(
        False,
        "the meta set is the test set, on purpose: an upper bound for the method, labelled as such "
        "in every result",
        only_with=META_AND_TEST,
        on_resume="free",
    )


# The weighting. What a variant does not let one choose is an attribute of its class.

Normalise: TypeAlias = Literal["batch", "table", "none"]
LowerData: TypeAlias = Literal["train", "meta"]


@dataclass(frozen=True, kw_only=True)
class _Unlearned:
    """What is trained on without a learned weighting."""

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
    """Range of the weights; learned weights are of the examples of the training file."""

    weights_file: ClassVar[None] = None
    lower_data: ClassVar[Literal["train"]] = "train"

    bound: Literal["clip", "clamp", "sigmoid", "softplus", "leaky-relu", "relu", "none"] = option(
        "sigmoid",
        "map from raw weights to weights; clip lets a weight that was pushed to an end come back, "
        "clamp (DreamPRM-1.5) does not",
        only_with=WEIGHTED,
    )
    bound_low: float = option(0.0, "lower end of the range", only_with=(WEIGHTED, BOUND_LOW))
    bound_high: float = option(2.0, "upper end of the range", only_with=(WEIGHTED, BOUND_HIGH))


@dataclass(frozen=True, kw_only=True)
class _Normalised:
    """Over what weights have mean 1."""

    normalise: Normalise = option(
        "batch",
        "mean 1 within the batch, over the whole table or weights file, or no normalisation",
        only_with=NORMALISED,
    )


@dataclass(frozen=True, kw_only=True)
class _Prior:
    """Where the weights of instances start."""

    prior: float = option(
        1.0,
        "weight of every instance at the start, and where decay pulls",
        only_with=(WEIGHTED, PRIOR),
    )


class _Featureless:
    """A weighting that reads nothing of the examples but who they are."""

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
        "example steps (how many), length (tokens), domain",
        only_with=(WEIGHTED, NET),
    )
    reference_features: bool = option(
        True,
        "give Instance Net the same features by the PRM as it was at the start, too: what the "
        "model said of a label before it could memorise it",
        only_with=(WEIGHTED, NET, MODEL_FEATURE),
    )
    hidden: int = option(10, "units per hidden layer of Instance Net", only_with=(WEIGHTED, NET))
    layers: int = option(1, "hidden layers of Instance Net", only_with=(WEIGHTED, NET))


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
class NoWeighting(_Featureless, _Normalised, _Unlearned):
    """No weighting is learned: all weights are 1, or those of a file."""

    kind: ClassVar[Literal["none"]] = "none"


WeightingOptions: TypeAlias = NetOptions | TableOptions | DomainOptions | NoWeighting
LearnedOptions: TypeAlias = NetOptions | TableOptions | DomainOptions


@dataclass(frozen=True, kw_only=True)
class UpperLevel:
    """The upper level: how and how often the weights move."""

    lr: str = option(
        "auto",
        "learning rate of the upper level; auto: solve for the one that lets a consistently bad "
        "example reach the lower bound within the run",
        name="upper_lr",
    )
    optimizer: Literal["adam", "lazy-adam", "sgd"] = option(
        "adam",
        "lazy-adam moves only the rows of a table that were visited",
        name="upper_optimizer",
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999), "decay rates of Adam's moments", name="upper_betas", only_with=UPPER_ADAM
    )
    weight_decay: float = option(
        0.0,
        "decoupled decay towards the prior (Adam)",
        name="upper_weight_decay",
        least=0,
        only_with=UPPER_ADAM,
    )
    schedule: Literal["cosine", "step", "constant"] = option(
        "cosine", "of the upper learning rate", name="upper_schedule"
    )
    warmup: float = option(
        0.0,
        "share of the upper steps with linear warm-up",
        name="upper_warmup",
        only_with=UPPER_COSINE,
    )
    step_size: int = option(
        1000,
        "upper steps between drops of the learning rate",
        name="upper_step_size",
        least=1,
        only_with=UPPER_STEP,
    )
    gamma: float = option(0.95, "factor of each drop", name="upper_gamma", only_with=UPPER_STEP)
    max_norm: float | None = option(
        None, "global-norm clip of the hypergradient; null: none", name="upper_max_norm"
    )
    meta_batch_size: int = option(64, "solutions per upper step", least=1)
    unroll_steps: int = option(1, "lower steps between upper steps", least=1)
    start: int = option(20, "lower steps before the first upper step", name="upper_start", least=0)


@dataclass(frozen=True, kw_only=True)
class OneStepOptions:
    """Through the last lower step of a window."""

    kind: ClassVar[Literal["one-step"]] = "one-step"

    route: Literal[
        "auto", "dot", "ghost", "per-example", "jvp", "reverse", "central-difference"
    ] = option("auto", "how the mixed second-order product is computed", only_with=ONE_STEP)
    difference_radius: float | None = option(
        None,
        "length of the shift of the parameters (central-difference); null: from their size and "
        "precision; Betty's, and so DreamPRM-1.5's, is 0.01",
        only_with=CENTRAL_DIFFERENCE,
    )
    order: Literal["upper-first", "lower-first"] = option(
        "upper-first",
        "evaluate the meta gradient before or after the lower step",
        only_with=ONE_STEP,
    )
    direction_decay: float = option(
        0.9, "exponential average of the meta gradient; 0: none", only_with=ONE_STEP
    )


@dataclass(frozen=True, kw_only=True)
class UnrolledOptions:
    """Through all lower steps of a window."""

    kind: ClassVar[Literal["unrolled"]] = "unrolled"


@dataclass(frozen=True, kw_only=True)
class ImplicitOptions:
    """At the end of a window, as if the lower level were solved."""

    kind: ClassVar[Literal["implicit"]] = "implicit"

    linear_solver: Literal["nystrom", "cg", "neumann"] = option(
        "nystrom", "of the system with the Hessian of the training loss", only_with=IMPLICIT
    )
    solver_iterations: int = option(
        10,
        "its iterations; nystrom: directions, which are kept in memory",
        least=1,
        only_with=IMPLICIT,
    )
    damping: float = option(0.1, "added to the Hessian's diagonal", only_with=IMPLICIT)


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """By a penalty on a second copy of the model."""

    kind: ClassVar[Literal["penalty"]] = "penalty"

    penalty_strength: float = option(
        10.0,
        "how strongly the copy is held to the training loss; its error falls with 1 / this",
        only_with=PENALTY,
    )


HypergradientOptions: TypeAlias = (
    OneStepOptions | UnrolledOptions | ImplicitOptions | PenaltyOptions
)
