"""Which weighting the options build, and what is refused."""

from __future__ import annotations

import pytest

from recipes.method.bounded_weights import WEIGHTINGS, make_weighting
from recipes.options.parse import changed, train_options
from recipes.options.values import OptionError
from weighting import KINDS, Clip, InstanceNet, InstanceTable, Sigmoid

OPTIONS = train_options(train_file="t", output_dir="o")


def test_every_weighting_of_the_package_is_registered_under_one_name():
    kinds = [registration.kind for registration in WEIGHTINGS.values()]
    assert set(kinds) == set(KINDS)
    assert len(kinds) == len(KINDS)
    rows = {name: registration.row for name, registration in WEIGHTINGS.items()}
    assert rows == {
        "net": "instance_net",
        "table": "instance_table",
        "domain": "domain_table",
        "labels": "step_labels",
    }


def test_options_reach_the_weighting():
    table = changed(OPTIONS, weighting="table", bound="clip", bound_low=-1.0, prior=0.5)
    assert make_weighting(table, 7, 0) == InstanceTable(7, 0.5, Clip(-1.0, 2.0), "batch")
    net = changed(OPTIONS, hidden=4, layers=2, features=("label", "loss", "domain"), centre=False)
    assert make_weighting(net, 7, 3) == InstanceNet(
        1 + 2 + 3, 4, 2, 1.0, Sigmoid(2.0), centre=False, normalise=True
    )
    assert make_weighting(changed(OPTIONS, weighting="none"), 7, 0) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prior": 3.0},
            "--weighting net: Sigmoid(scale=2.0) gives weights between 0 and 2",
        ),
        ({"features": ("entropy",)}, "--features: expected among p_plus, p_minus, label"),
        ({"features": ("domain",)}, "--features: the feature 'domain' needs examples"),
        ({"batch_size": 1}, "use 2 or more, or --normalise none --no-centre"),
        ({"weighting": "table", "batch_size": 1}, "use 2 or more, or --normalise table"),
        ({"weighting": "domain", "bound": "clip"}, "which is 0 for --bound clip"),
        ({"weighting": "domain"}, "--weighting domain: DomainTable needs size >= 1; found 0"),
    ],
)
def test_what_cannot_be_built_is_refused_by_the_names_of_its_options(given, message):
    with pytest.raises(OptionError) as error:
        make_weighting(changed(OPTIONS, **given), 8, 0)
    assert message in str(error.value)


def test_a_batch_of_one_is_fine_where_nothing_is_compared_within_it():
    one = changed(OPTIONS, batch_size=1, normalise="none")
    assert make_weighting(changed(one, weighting="table"), 8, 0) is not None
    assert make_weighting(changed(one, centre=False), 8, 0) is not None
    with pytest.raises(OptionError, match="within a micro-batch"):
        make_weighting(one, 8, 0)
