"""Instance weights: from ids, domains or features of examples to weights in a bounded range."""

from weighting.base import EXAMPLE_KEYS, MODEL_KEYS, Weighting, reads_model
from weighting.bounds import (
    Bound,
    Clip,
    LeakyReLU,
    Sigmoid,
    Softplus,
    Unbounded,
    effective_sample_size,
    fraction_at_bound,
)
from weighting.features import (
    EXAMPLE_FEATURES,
    FEATURES,
    batch_features,
    example_features,
    feature_count,
    is_model_feature,
    step_features,
)
from weighting.gradients import (
    SKETCH_WIDTH,
    GradientFeatures,
    example_gradients,
    leaf_scales,
    sketch,
)
from weighting.heuristics import (
    balanced_information,
    confident_labels,
    keep_best,
    tolerant_labels,
)
from weighting.instance_net import InstanceNet
from weighting.labels import StepLabels
from weighting.normalise import batch_mean_one, mean_one_over
from weighting.store import KINDS, load_weighting, row_index, save_weighting
from weighting.tables import DomainTable, InstanceTable
from weighting.travel import NetTravel

__all__ = [
    "EXAMPLE_FEATURES",
    "EXAMPLE_KEYS",
    "FEATURES",
    "KINDS",
    "MODEL_KEYS",
    "SKETCH_WIDTH",
    "Bound",
    "Clip",
    "DomainTable",
    "GradientFeatures",
    "InstanceNet",
    "InstanceTable",
    "LeakyReLU",
    "NetTravel",
    "Sigmoid",
    "Softplus",
    "StepLabels",
    "Unbounded",
    "Weighting",
    "balanced_information",
    "batch_features",
    "batch_mean_one",
    "confident_labels",
    "effective_sample_size",
    "example_features",
    "example_gradients",
    "feature_count",
    "fraction_at_bound",
    "is_model_feature",
    "keep_best",
    "leaf_scales",
    "load_weighting",
    "mean_one_over",
    "reads_model",
    "row_index",
    "save_weighting",
    "sketch",
    "step_features",
    "tolerant_labels",
]
