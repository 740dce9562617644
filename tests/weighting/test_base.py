"""What every weighting promises: by the batch, by the file, at the start, at the bound."""

from __future__ import annotations

import math

import pytest
import torch

from weighting import (
    KINDS,
    Clip,
    DomainTable,
    InstanceNet,
    InstanceTable,
    Sigmoid,
    Unbounded,
    reads_model,
)

DOMAINS = torch.tensor([1, 0, 1, 1])
FEATURES = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0))
FILE = {
    "index": torch.tensor([2, 0, 1, 3]),
    "domain": DOMAINS,
    "features": FEATURES,
    "feature_mask": torch.tensor([[True, True, False]] * 4),
}
WEIGHTINGS = {
    "table": InstanceTable(4, prior=0.5, normalise="none"),
    "normalised table": InstanceTable(4, bound=Sigmoid(2.0), normalise="table"),
    "domains": DomainTable(2),
    "net": InstanceNet(2, prior=0.5),
    "plain net": InstanceNet(2, prior=0.5, centre=False, normalise=False),
}


def parts(batch, sizes):
    """The same examples in several batches."""
    columns = {name: values.split(sizes) for name, values in batch.items()}
    return [{name: column[k] for name, column in columns.items()} for k in range(len(sizes))]


def moved(weighting):
    """Parameters away from the start."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in weighting.init(generator).items()
    }


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_all_examples_start_at_one_weight(weighting):
    params = weighting.init(torch.Generator().manual_seed(3))
    normalised = 1.0 if getattr(weighting, "normalise", True) else weighting.start
    if getattr(weighting, "normalise", None) == "none":
        normalised = weighting.start
    torch.testing.assert_close(weighting.batch_weights(params, FILE), torch.full((4,), normalised))
    weights, raw = weighting.file_weights(params, parts(FILE, [3, 1]))
    torch.testing.assert_close(weights, torch.full((4,), normalised))
    if not isinstance(weighting, DomainTable):
        torch.testing.assert_close(raw, torch.full((4,), weighting.bound.raw(weighting.start)))
    else:
        assert raw.tolist() == [0.0] * 4


def test_only_what_is_read_is_needed():
    for weighting in WEIGHTINGS.values():
        read = {name: FILE[name] for name in weighting.reads}
        params = moved(weighting)
        assert torch.equal(
            weighting.batch_weights(params, read), weighting.batch_weights(params, FILE)
        )
        assert reads_model(weighting) == isinstance(weighting, InstanceNet)


def test_a_file_is_weighed_as_a_whole_however_it_is_cut():
    for weighting in WEIGHTINGS.values():
        params = moved(weighting)
        whole, raw = weighting.file_weights(params, [FILE])
        cut, cut_raw = weighting.file_weights(params, parts(FILE, [1, 3]))
        torch.testing.assert_close(cut, whole)
        torch.testing.assert_close(cut_raw, raw)
        assert len(set(raw.tolist())) == (2 if isinstance(weighting, DomainTable) else 4)


def test_weights_of_a_file_follow_their_formulas():
    table = InstanceTable(4, prior=0.5, normalise="table")
    params = {"deviation": torch.tensor([0.0, 0.5, 1.0, 2.0])}  # weights 0.5, 1, 1.5, 2: mean 1.25
    part = {"index": torch.tensor([3, 0])}
    weights, raw = table.file_weights(params, [part])
    assert (weights.tolist(), raw.tolist()) == (pytest.approx([1.6, 0.4]), [2.5, 0.5])
    domains = DomainTable(2, Sigmoid(2.0))
    weights, raw = domains.file_weights({"raw": torch.tensor([0.0, 1.0])}, [FILE])
    ratio = 2 / (1 + math.exp(-1.0))  # of domain 1, which three of four examples belong to
    mean = (1 + 3 * ratio) / 4
    assert weights.tolist() == pytest.approx([ratio / mean, 1 / mean, ratio / mean, ratio / mean])
    assert raw.tolist() == [1.0, 0.0, 1.0, 1.0]
    net = InstanceNet(2)
    params = moved(net)
    weights, raw = net.file_weights(params, parts(FILE, [2, 2]))
    expected = 2 * torch.sigmoid(raw - raw.mean())
    torch.testing.assert_close(weights, expected / expected.mean())


def test_rows_and_names():
    assert [kind.row_key for kind in KINDS] == ["index", None, "domain", "index"]
    assert [w.size for w in (InstanceTable(3), DomainTable(2), InstanceNet(5))] == [3, 2, 0]


def test_nothing_but_a_clipped_table_is_projected():
    table = InstanceTable(2, bound=Clip(0.0, 2.0))
    far = {"deviation": torch.tensor([9.0, 0.5])}
    assert table.project(far)["deviation"].tolist() == [1.0, 0.5]
    for weighting in (InstanceTable(2, bound=Sigmoid(2.0)), DomainTable(2), InstanceNet(1)):
        assert weighting.project(far) is far


@pytest.mark.parametrize(
    ("weighting", "upper", "weights", "share"),
    [
        (InstanceTable(3, bound=Clip(0, 2)), {"deviation": [1.0, -1.0, 0.985]}, [1.0], 1.0),
        (InstanceTable(3, bound=Clip(0, 2)), {"deviation": [1.0, -1.0, 0.9]}, [1.0], 2 / 3),
        (DomainTable(2, Sigmoid(2.0)), {"raw": [9.0, -9.0]}, [1.0], 1.0),
        (DomainTable(2, Sigmoid(2.0)), {"raw": [9.0, 1.0]}, [1.0], 0.5),
        (InstanceNet(1, normalise=False), {}, [0.01, 1.99], 1.0),
        (InstanceNet(1, normalise=False), {}, [0.01, 1.0], 0.5),
        # Normalised to mean 1: 0.015 and 1.99 of [0, 2] in the ratio that they had.
        (InstanceNet(1), {}, [0.015 / 1.0025, 1.99 / 1.0025], 1.0),
        (InstanceNet(1), {}, [1.0, 1.0], 0.0),
        (InstanceNet(1, bound=Unbounded()), {}, [0.0, 2.0], 0.0),
    ],
)
def test_share_of_weights_at_the_bound(weighting, upper, weights, share):
    params = {name: torch.tensor(values) for name, values in upper.items()}
    assert weighting.share_at_bound(params, torch.tensor(weights)) == pytest.approx(share)
