"""Signs of a method that goes astray: what each says of a log, and when a run tells it."""

from __future__ import annotations

import json
import math

import pytest

from recipes.train.signs import log_lines, signs, watcher

STEPS = 120


def log(upper=(), scores=(), right=0.5, troubles=()):
    """Lines of every tenth step."""
    lines = []
    for number in range(STEPS // 10):
        line = {"phase": "instance_net", "step": 10 * (number + 1), "lower_loss": 0.5}
        if number < len(upper):
            line["upper_loss"] = upper[number]
        if number < len(scores):
            line |= {"meta/score": scores[number], "meta/right": right}
        if number < len(troubles) and troubles[number]:
            line["troubles"] = {"weights_at_bound": troubles[number]}
        lines.append(line)
    return lines


def kinds(lines):
    return [sign.kind for sign in signs(lines, STEPS)]


def zigzag(start, end, amplitude):
    """Values that go from start to end, alternately above and below the line."""
    values = [start + (end - start) * n / 11 for n in range(12)]
    return [value + amplitude * (-1) ** n for n, value in enumerate(values)]


def test_an_upper_loss_that_falls_beyond_its_scatter_is_no_sign():
    assert kinds(log(zigzag(0.7, 0.4, 0.01))) == []
    assert kinds(log(zigzag(0.7, 0.7, 0.01))) == ["upper_loss_did_not_fall"]
    assert kinds(log(zigzag(0.4, 0.7, 0.01))) == ["upper_loss_did_not_fall"]
    assert kinds(log(zigzag(0.7, 0.69, 0.1))) == ["upper_loss_did_not_fall"]


def test_the_figures_are_means_of_thirds_and_their_errors():
    (sign,) = signs(log([1.0, 1.2, 1.0, 1.2] + [9.0] * 4 + [1.5] * 4), STEPS)
    error = math.sqrt(4 * 0.1**2 / 3) / 2  # of 1.0, 1.2, 1.0, 1.2
    assert f"1.100 ± {error:.3f} in the first third" in sign.text
    assert "1.500 ± 0.000 in the last" in sign.text


def test_few_upper_steps_and_lines_without_a_number_say_nothing():
    assert kinds(log(zigzag(0.7, 0.7, 0.0)[:5])) == []
    assert kinds(log([None] * 8 + [0.7] * 4)) == []
    assert kinds(log()) == []


def test_weights_at_their_bound_are_a_sign_in_the_first_quarter():
    falling = zigzag(0.7, 0.4, 0.01)
    assert kinds(log(falling, troubles=[0, 0, 3])) == ["weights_at_bound_early"]
    assert kinds(log(falling, troubles=[0, 0, 0, 3])) == []


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (0.7, 0.29, True),  # of 70 % right ones: found on real labels
        (0.7, 0.6, False),
        (0.5, 0.72, False),  # closer to the outcomes than at the start
        (0.9, 0.55, False),
        (0.9, 0.2, True),
    ],
)
def test_scores_that_leave_the_outcomes_are_a_sign(start, end, found):
    lines = log(zigzag(0.7, 0.4, 0.01), zigzag(start, end, 0.005), right=0.7)
    assert ("scores_left_the_outcomes" in kinds(lines)) == found


def test_a_run_tells_each_sign_once_at_a_quarter(tmp_path, capsys):
    path, lines = tmp_path / "log.jsonl", log(zigzag(0.7, 0.7, 0.01))
    watch = watcher(path, "instance_net", STEPS)
    told = {}
    with path.open("w") as file:
        for line in [{"phase": "cold start", "step": 10, "upper_loss": 1.0}, *lines]:
            file.write(json.dumps(line) + "\n")
            file.flush()
            if line["phase"] == "instance_net":
                watch(line["step"], None)
                if text := capsys.readouterr().err:
                    told[line["step"]] = text
    assert list(told) == [60]  # At 30 there are too few lines.
    assert told[60].startswith("instance_net, step 60: the upper loss did not fall")
    assert log_lines(path, "instance_net") == lines
    assert log_lines(tmp_path / "none.jsonl", "instance_net") == []
