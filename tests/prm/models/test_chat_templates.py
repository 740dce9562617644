"""Chat templates are programs of others: they end in time, or are refused."""

from __future__ import annotations

import pytest

from prm.models.chat_templates import MOST_CHARACTERS, check_terminates
from prm.models.untrusted import ModelError
from tests.prm.tiny import CHAT_TEMPLATE
from tests.prm.tiny_processed import GEMMA_TEMPLATE

FUNCTIONS = (
    "{% set n = namespace(x=0) %}{% for m in messages %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% generation %}{{ m | tojson(indent=2) }}{% endgeneration %}{{ strftime_now('%Y') }}"
    "{% set n.x = n.x + 1 %}{% endfor %}{{ dict(a=n.x) }}{{ bos_token }}"
)
"""Everything that transformers adds to Jinja."""


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, GEMMA_TEMPLATE, FUNCTIONS, "", None, 3, {"default": CHAT_TEMPLATE}]
)
def test_good_templates_pass(template):
    check_terminates(template, "m")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system turn') }}", "{% for %}", "{{ 1 // 0 }}", "{{ nothing.x.y }}"],
)
def test_templates_that_fail_are_left_to_the_renderer(template):
    check_terminates(template, "m")


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ range(99999) | list | string | length }}" + "{{ 'x' | center(10**10) }}",
        "{% if messages | length > 9 %}{{ 2 ** (2 ** 60) }}{% endif %}",
        f"{{{{ 'x' * {MOST_CHARACTERS + 1} }}}}",
        {"default": CHAT_TEMPLATE, "tools": "{{ 'x' * 10**8 }}"},
    ],
    ids=["recursion", "padding", "after nine turns", "one too long", "the second of two"],
)
def test_templates_that_take_too_much_are_refused(template):
    with pytest.raises(ModelError, match=r"^m: expected a chat template that renders .* loops"):
        check_terminates(template, "m")


def test_the_longest_text_that_a_template_may_render():
    half = MOST_CHARACTERS // 2
    check_terminates(f"{{{{ 'x' * {half} }}}}{{{{ 'x' * {MOST_CHARACTERS - half} }}}}", "m")
