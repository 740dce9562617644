"""Which examples need not be tokenised to be checked: the verdict is always that of ``encode``."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prm.inputs.collate import Collator
from prm.inputs.layout import Layout
from prm.inputs.prompt import PromptEncoder
from prm.inputs.template_probe import looked_for
from prm.inputs.tiles import Tiler
from prm.inputs.tokens import tile_tokens
from prm.schema import DataError, Step, StepExample
from tests.prm.tiny import (
    CHAT_TEMPLATE,
    SPECIAL,
    byte_tokenizer,
    image_processor,
    internvl,
    qwen2_tokenizer,
    save_image,
    word_tokenizer,
)

TRIMMING = CHAT_TEMPLATE.replace("message['content']", "(message['content'] | trim)")
THINKING = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>'",
    "{% if message.role == 'user' and message.content.startswith('<tool>') %}{{ 1 // 0 }}"
    "{% endif %}{{ '<|im_start|>'",
)
BLIND = {"plain": CHAT_TEMPLATE, "trims": TRIMMING, "looks for <tool>": THINKING}
LOOKING = {
    "length": "{% if messages[0].content | length > 90 %}{{ 1 // 0 }}{% endif %}" + CHAT_TEMPLATE,
    "a character": "{% if messages[0].content[-1] == 'z' %}{{ 1 // 0 }}{% endif %}" + CHAT_TEMPLATE,
    "upper case": "{% if messages[0].content | upper == 'X' %}{% endif %}" + CHAT_TEMPLATE,
    "a joined text": "{% if 'zz' in messages[0].content ~ '' %}{{ 1 // 0 }}{% endif %}"
    + CHAT_TEMPLATE,
    "a text with another in front": "{% if 'zz' in 'z' + messages[0].content %}{{ 1 // 0 }}"
    "{% endif %}" + CHAT_TEMPLATE,
    "a copy": "{% set kept %}{{ messages[0].content }}{% endset %}{% if 'zz' in kept %}"
    "{{ 1 // 0 }}{% endif %}" + CHAT_TEMPLATE,
    "escapes": CHAT_TEMPLATE.replace(
        "message['content']",
        "(message['content'] | tojson if message.role == 'user' else message['content'])",
    ),
    "beginning alone": CHAT_TEMPLATE.replace("message['content']", "message['content'][:300]"),
}


def unigram_tokenizer(normalizer: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """Like SentencePiece: marks for spaces, and unknown characters as bytes."""
    characters = [(chr(code), -5.0) for code in range(33, 127)]
    pieces = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    special = [(token, 0.0) for token in SPECIAL]
    core = Tokenizer(
        models.Unigram([*special, ("\u2581", -3.0), *characters, *pieces], 3, byte_fallback=True)
    )
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def nfc(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def nfkd(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    parts = [normalizers.NFKD(), normalizers.Lowercase(), normalizers.Replace(" ", "_")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


TOKENIZERS = {
    "words": word_tokenizer,
    "bytes": byte_tokenizer,
    "bytes, composed": lambda: nfc(byte_tokenizer()),
    "bytes, decomposed": lambda: nfkd(byte_tokenizer()),
    "qwen2": qwen2_tokenizer,
}
PIECES = [
    *("one plus two is four", " ", "\n\n", "a", "+", "-", "x = \\frac{1}{2}", "1,000"),
    *("é", "e\u0301", "中文", "ﷺ", "\U0001d160", "\u0958", "İ", "\u0344", "½", "🙂", "\u2126"),
]


def texts(rng: random.Random) -> str:
    return "a" + "".join(rng.choices(PIECES, k=rng.randint(1, 12))) + "b"


def examples(count: int, seed: int = 0) -> list[StepExample]:
    rng = random.Random(seed)
    return [
        StepExample(
            str(number),
            texts(rng),
            (),
            tuple(Step(texts(rng), rng.choice([0.0, 1.0, None])) for _ in range(rng.randint(1, 5))),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("context", ["plus", "gold", "masked"])
def test_what_fits_by_the_bound_fits_and_nearly_all_short_examples_do(make, context):
    """The limit is one token less than the bound allows, so at most that of the exact length."""
    prompt = PromptEncoder(make(), context=context, system_prompt="judge each step")
    free = Layout(prompt)
    items = examples(150)
    for item in items:
        prompt.max_length = None
        assert free.fits(item, ())
        length = len(prompt.encode(item)[0])
        prompt.max_length = length - 1
        assert not free.fits(item, ())
        prompt.max_length = 2_000
        assert free.fits(item, ())


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.NFKC(), normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])],
    ids=["composed", "decomposed"],
)
def test_a_tokenizer_like_sentencepiece(normalizer):
    prompt = PromptEncoder(unigram_tokenizer(normalizer), system_prompt="judge each step")
    layout = Layout(prompt)
    for item in examples(100):
        prompt.max_length = None
        length = len(prompt.encode(item)[0])
        prompt.max_length = length - 1
        assert not layout.fits(item, ())
        prompt.max_length = 4_000
        assert layout.fits(item, ())


def test_a_tokenizer_that_lengthens_text_is_asked_every_time():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "aaaaaaaa")
    layout = Layout(PromptEncoder(tokenizer, system_prompt=None))
    assert not any(layout.fits(item, ()) for item in examples(5))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("aaaaaaaa", "a")
    layout = Layout(PromptEncoder(tokenizer, system_prompt=None))
    assert all(layout.fits(item, ()) for item in examples(5))


@pytest.mark.parametrize("template", BLIND.values(), ids=BLIND)
def test_a_template_that_looks_at_no_text_is_rendered_once_for_each_shape(template, monkeypatch):
    prompt = PromptEncoder(byte_tokenizer(template), system_prompt="judge", max_length=4_000)
    collator = Collator(prompt)
    items = examples(300)
    assert collator.check(items) == [None] * 300
    calls = []
    original = prompt.encode_many
    monkeypatch.setattr(prompt, "encode_many", lambda *rows: calls.append(rows) or original(*rows))
    assert collator.check(items) == [None] * 300
    assert calls == []


@pytest.mark.parametrize("template", LOOKING.values(), ids=LOOKING)
def test_every_example_is_tokenised_for_a_template_that_looks_at_texts(template):
    prompt = PromptEncoder(byte_tokenizer(template), system_prompt=None, max_length=4_000)
    layout = Layout(prompt)
    assert not any(layout.fits(item, ()) for item in examples(20))


def same(found: DataError | None, expected: DataError | None) -> bool:
    return str(found) == str(expected)


@pytest.mark.parametrize("template", [*BLIND.values(), *LOOKING.values()])
def test_the_verdict_is_that_of_encoding(template):
    """Of texts that the template refuses, that imitate it, that are too long, and of others."""
    prompt = PromptEncoder(byte_tokenizer(template), system_prompt=None, max_length=700)
    items = examples(40)
    for at, text in ((3, "zz"), (5, "<|im_end|>"), (9, "<tool> z"), (11, "a" * 900), (20, "z")):
        items[at] = replace(items[at], question=text)
        items[at + 1] = replace(items[at + 1], steps=(Step(text), Step("<tool>")))
    items.append(replace(items[0], steps=(Step("a"),) * 60))
    items.append(replace(items[0], steps=(Step("<tool> first"), Step("<tool> second"))))
    collator = Collator(prompt)
    expected = [error if isinstance(error, DataError) else None for error in
                collator.encode_many(items)]  # fmt: skip
    assert all(map(same, collator.check(items), expected))
    assert 2 < sum(error is not None for error in expected) < len(items)


def test_labels_beside_the_text_of_an_example_are_tokenised_every_time():
    """Without a special token between a step and its label, the step decides on its tokens."""
    loose = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    loose += "{% if add_generation_prompt %}{% endif %}"
    layout = Layout(PromptEncoder(word_tokenizer(loose), system_prompt=None))
    assert not layout.fits(StepExample("a", "one", (), (Step("two"),)), ())


@pytest.mark.parametrize("size", [(56, 56), (56, 168)])
def test_images_count_with_their_tokens(tmp_path, size):
    """The limit is found to which an example with two images fits, exactly and by the bound."""
    path = save_image(tmp_path / "x.png", *size)
    tokenizer = byte_tokenizer()
    config = internvl(tokenizer).model.config
    prompt = PromptEncoder(tokenizer, image_tokens=tile_tokens(tokenizer, config))
    collator = Collator(prompt, Tiler(image_processor()))
    item = StepExample("a", "one", (path, path), (Step("two"),))
    length = len(collator.encode(item).input_ids)
    prompt.max_length = length - 1
    (error,) = collator.check([item])
    assert error is not None
    assert error.found == str(length)
    images = [collator.images.expanded(path, prompt.image_tokens)] * 2
    limits = []
    for limit in range(length - 5, length + 60):
        prompt.max_length = limit
        if Layout(prompt).fits(item, images):
            limits.append(limit)
    assert length <= min(limits) < length + 30
    assert collator.check([replace(item, images=(tmp_path / "none.png",))])[0] is not None


def test_what_a_template_looks_for():
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "+"}]]
    assert looked_for("{{ messages[0].content }}", turns, {}) == frozenset()
    found = "{% if 'x' in messages[0].content or messages[1].content == 'y' %}{% endif %}"
    assert looked_for(found, turns, {}) == {"x", "y"}
    split = "{{ messages[0].content.split('</t>')[-1].strip('\n') }}"
    assert looked_for(split, turns, {}) == {"</t>"}
    assert looked_for("{{ messages[0].content.split()[0] }}", turns, {}) is None
    assert looked_for("{{ messages[0].content.strip('ab') }}", turns, {}) is None
    assert looked_for("{% if messages[0].content is string and messages[0].content is iterable %}"
                      "{{ messages[0].content }}{% endif %}", turns, {}) == frozenset()  # fmt: skip
    assert looked_for("{% for c in messages[0].content %}{% endfor %}", turns, {}) is None
    assert looked_for("{% macro m(t) %}{{ t }}{% endmacro %}", turns, {}) is None
    assert looked_for("{{ raise_exception('no') }}", turns, {}) is None
    assert looked_for("{% generation %}", turns, {}) is None
    assert looked_for("{{ token }}{{ messages[0].content < 'b' }}", turns, {"token": "t"}) is None
    parts = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]]
    by_part = "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    assert looked_for(by_part + "{% endfor %}", parts, {}) == frozenset()
    assert looked_for("{{ messages[0].content[1].text | length }}", parts, {}) is None
