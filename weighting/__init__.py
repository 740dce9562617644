"""Instance weights: from ids, domains or features of examples to weights in a bounded range."""

from weighting.bounds import Bound, Clip, LeakyReLU, Sigmoid, Softplus, Unbounded
from weighting.features import (
    EXAMPLE_FEATURES,
    FEATURES,
    example_features,
    feature_count,
    is_model_feature,
    step_features,
)
from weighting.heuristics import balanced_information, keep_best
from weighting.instance_net import InstanceNet
from weighting.normalise import batch_mean_one, mean_one_over
from weighting.stats import effective_sample_size, fraction_at_bound
from weighting.store import Weighting, load_weighting, row_index, save_weighting
from weighting.tables import DomainTable, InstanceTable

__all__ = [
    "EXAMPLE_FEATURES",
    "FEATURES",
    "Bound",
    "Clip",
    "DomainTable",
    "InstanceNet",
    "InstanceTable",
    "LeakyReLU",
    "Sigmoid",
    "Softplus",
    "Unbounded",
    "Weighting",
    "balanced_information",
    "batch_mean_one",
    "effective_sample_size",
    "example_features",
    "feature_count",
    "fraction_at_bound",
    "is_model_feature",
    "keep_best",
    "load_weighting",
    "mean_one_over",
    "row_index",
    "save_weighting",
    "step_features",
]
