"""``Scorer``: values against one forward pass per solution, kinds of input, what is refused."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image

from prm.models.model import PRM, load_prm, save_prm, step_logits
from prm.rewards.scorer import Scorer
from prm.schema import DataError, Step, StepExample
from tests.prm.tiny import SYSTEM, internvl, save_image, told

STEPS = ["one plus two is three", "three plus one is four", "four is two plus two"]
QUESTION = "what is one plus two"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    prm = internvl(dtype=torch.float32)
    path = tmp_path_factory.mktemp("scorer") / "model"
    save_prm(told(prm), {}, path)
    return path


@pytest.fixture(scope="module")
def scorer(folder) -> Scorer:
    return Scorer.from_pretrained(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return save_image(tmp_path_factory.mktemp("pictures") / "wide.png", 100, 60, seed=1)


def opened(source) -> Image.Image:
    """A picture as a program holds it, its file closed."""
    with Image.open(source) as image:
        image.load()
        return image


def alone(prm: PRM, steps, images=()) -> list[float]:
    """The step scores of one solution, from the library's parts and a softmax of its own."""
    row = StepExample("a", QUESTION, images, tuple(map(Step, steps)))
    batch = prm.collator(system_prompt=SYSTEM, max_patches=3, context="plus")([row])
    with torch.no_grad():
        return step_logits(prm, {}, batch)[0].softmax(-1)[:, 0].tolist()


def test_scores_are_those_of_a_pass_for_each_solution(scorer, folder, picture):
    prm = load_prm(folder)
    solutions = [STEPS, STEPS[:1], STEPS[::-1], STEPS[1:]]
    images = [picture, None, [picture, picture], []]
    found = scorer.score([QUESTION] * 4, solutions, images)
    shown = [(picture,), (), (picture, picture), ()]
    for scores, steps, paths in zip(found, solutions, shown, strict=True):
        assert scores == pytest.approx(alone(prm, steps, paths), abs=1e-6)
    judged = scorer.judge([QUESTION] * 4, solutions, images)
    assert [one.score for one in judged] == [min(scores) for scores in found]
    assert [list(one.step_scores) for one in judged] == found
    assert not any(one.is_truncated for one in judged)


def test_a_text_is_split_as_the_readers_of_data_split_it(scorer):
    text = "Step 1: one plus two is three\nStep 2: three is three\n"
    steps = ["Step 1: one plus two is three", "Step 2: three is three"]
    assert scorer.score([QUESTION], [text]) == scorer.score([QUESTION], [steps])


def test_a_picture_is_the_same_however_it_is_given(scorer, picture):
    raw = picture.read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(raw).decode()}"
    kinds = [picture, str(picture), raw, url, opened(picture), {"bytes": raw, "path": None}]
    found = scorer.score([QUESTION] * 6, [STEPS] * 6, kinds)
    assert found == [found[0]] * 6
    assert found[0] != scorer.score([QUESTION], [STEPS])[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1", "I;16"])
def test_a_pillow_image_is_read_as_its_file_would_be(scorer, picture, tmp_path, mode):
    image = opened(picture)
    if mode == "I;16":
        image = Image.frombytes("I;16", (64, 64), bytes(range(256)) * 32)
    else:
        image = image.convert(mode)
    path = tmp_path / f"picture.{'tiff' if mode == 'CMYK' else 'png'}"
    image.save(path)
    by_file, given = scorer.score([QUESTION] * 2, [STEPS] * 2, [path, image])
    assert by_file == given


def test_a_turned_photo_stays_turned(scorer, picture):
    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    opened(picture).convert("RGB").save(file, "JPEG", exif=exif, quality=100)
    raw = file.getvalue()
    by_file, given = scorer.score([QUESTION] * 2, [STEPS] * 2, [raw, opened(io.BytesIO(raw))])
    assert by_file == given


def test_a_picture_that_changed_is_read_again(scorer, tmp_path):
    path = save_image(tmp_path / "sheet.png", 60, 60, seed=1)
    before = scorer.score([QUESTION], [STEPS], [path])
    save_image(path, 60, 60, seed=2)
    assert scorer.score([QUESTION], [STEPS], [path]) != before


def test_solutions_are_ranked_and_the_best_is_taken(scorer):
    solutions = [STEPS[:1], STEPS, STEPS[1:], STEPS[:1]]
    scores = [min(found) for found in scorer.score([QUESTION] * 4, solutions)]
    order = scorer.rank(QUESTION, solutions)
    assert [scores[index] for index in order] == sorted(scores, reverse=True)
    assert order.index(0) + 1 == order.index(3)  # a tie keeps the order given
    tied = [STEPS[:1]] * 3
    assert scorer.best_of_n(QUESTION, tied, tie="first") == 0
    assert scorer.best_of_n(QUESTION, tied, tie="last") == 2
    assert {scorer.best_of_n(QUESTION, tied, seed=seed) for seed in range(20)} == {0, 1, 2}
    assert scores[scorer.best_of_n(QUESTION, solutions)] == max(scores)
    with pytest.raises(ValueError, match="expected at least one candidate"):
        scorer.best_of_n(QUESTION, [])
    assert scorer.score([], []) == []


@pytest.mark.parametrize(
    ("question", "solution", "image", "said"),
    [
        (QUESTION, "", None, "field steps: expected at least one step"),
        (QUESTION, ["one", " "], None, r"field steps\[1\]: expected a string that is not blank"),
        (QUESTION, ["one", 2], None, r"field steps\[1\]: expected a string"),
        ("", STEPS, None, "field question: expected a string that is not blank"),
        ("what \ud800", STEPS, None, "field question: expected text that UTF-8 can hold"),
        (QUESTION, ["one <|im_end|>"], None, "without the tokens that the chat template is made"),
        (QUESTION, STEPS, "no/such.png", "expected an image file, found no such file"),
        (QUESTION, STEPS, "https://a.org/b.png", r"field images\[0\]: expected the path of an im"),
        (QUESTION, STEPS, Image.new("F", (4, 4)), r"field images\[0\]: .*found mode 'F'"),
    ],
)
def test_what_cannot_be_judged_is_named(scorer, question, solution, image, said):
    questions, solutions = [QUESTION, question], [STEPS, solution]
    images = None if image is None else [None, image]
    good, bad = scorer.judge(questions, solutions, images)
    assert list(good.step_scores) == scorer.score([QUESTION], [STEPS])[0]
    assert isinstance(bad, DataError)
    with pytest.raises(DataError, match=rf"example 'solutions\[1\]': {said}|{said}"):
        scorer.score(questions, solutions, images)
    assert bad.example == "solutions[1]" or image == "no/such.png"


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ((QUESTION, [STEPS]), "expected a list of questions, one entry .* found str"),
        (([QUESTION], STEPS), "found 1 questions, 3 solutions"),
        (([QUESTION], [STEPS], []), "found 1 questions, 1 solutions, 0 images"),
        (([QUESTION], [STEPS], b"x"), "expected a list of images, .* found bytes"),
    ],
)
def test_lists_that_do_not_fit_are_refused(scorer, lists, said):
    with pytest.raises(ValueError, match=said):
        scorer.score(*lists)


def test_long_solutions_are_refused_or_cut(folder):
    prm = load_prm(folder)
    prm.model.config.get_text_config().max_position_embeddings = 60
    long = STEPS * 5
    whole = Scorer(load_prm(folder)).score([QUESTION], [long])[0]
    (refused,) = Scorer(prm).judge([QUESTION], [long])
    assert "expected at most 60 tokens" in str(refused)
    (cut,) = Scorer(prm, too_long="truncate").judge([QUESTION], [long])
    assert cut.is_truncated
    assert (cut.steps, 0 < len(cut.step_scores) < 15) == (15, True)
    assert cut.step_scores == pytest.approx(whole[: len(cut.step_scores)], abs=1e-6)


def test_a_model_that_does_not_say_how_it_is_asked_is_refused(tmp_path):
    save_prm(internvl(dtype=torch.float32), {}, tmp_path / "model")
    with pytest.raises(ValueError, match=r"how it is asked, found none beside it \(prm.json\)"):
        Scorer.from_pretrained(tmp_path / "model")
    prm = load_prm(tmp_path / "model")
    told = Scorer(replace(prm, conventions=replace(prm.usage, system_prompt=SYSTEM, max_patches=3)))
    assert told.score([QUESTION], [STEPS])[0] == pytest.approx(alone(prm, STEPS), abs=1e-6)


def test_where_and_how_it_computes_is_the_callers_choice(folder):
    half = Scorer.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.prm.model.dtype == torch.bfloat16
    mixed = Scorer.from_pretrained(folder, dtype="bf16", device="cpu")
    assert (mixed.prm.model.dtype, mixed.prm.autocast) == (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="device abacus: expected auto, cpu"):
        Scorer.from_pretrained(folder, device="abacus")
    with pytest.raises(ValueError, match=r"dtype torch\.float16: expected auto, float32"):
        Scorer.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected batch_size >= 1, found 0"):
        Scorer.from_pretrained(folder, batch_size=0)


def test_threads_get_the_scores_of_one(scorer):
    solutions = [STEPS[: 1 + n % 3] for n in range(8)]
    expected = [scorer.score([QUESTION], [solution])[0] for solution in solutions]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda solution: scorer.score([QUESTION], [solution])[0], solutions)
    assert list(found) == expected


def test_scores_that_are_no_numbers_are_refused(folder):
    prm = load_prm(folder)
    broken = Scorer(prm)
    with torch.no_grad():
        prm.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(DataError, match=r"'solutions\[0\]': expected numbers as step scores"):
        broken.score([QUESTION], [STEPS])
