"""What prm relies on that torch does not promise. Tried with the versions below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import prm
from prm.models.torch_internals import function_modes, inside_transform
from tests.prm.tiny import FORWARD_MODE

MODULES = sorted(Path(prm.__file__).parent.rglob("*.py"))
TRIED = ("2.13",)
HINT = f"torch {torch.__version__} answers otherwise than {', '.join(TRIED)}: torch_internals.py"


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@FORWARD_MODE
def test_transforms_are_seen():
    answers = {}

    def asked(name):
        def function(x):
            answers[name] = inside_transform()
            return (x * x).sum()

        return function

    x = torch.arange(3.0)
    torch.func.grad(asked("grad"))(x)
    torch.func.vjp(asked("vjp"), x)
    torch.func.jvp(asked("jvp"), (x,), (x,))
    torch.func.vmap(asked("vmap"))(x)
    torch.func.functional_call(torch.nn.Identity(), {}, (x,))
    asked("plain")(x)
    asked("autograd")(x.requires_grad_()).backward()
    inside = {name for name, answer in answers.items() if answer}
    assert inside == {"grad", "vjp", "jvp", "vmap"}, HINT
    assert not inside_transform(), HINT


def test_open_modes_are_listed_from_the_outside():
    outer, inner = Mode(), Mode()
    before = function_modes()
    with outer, inner:
        assert function_modes() == [*before, outer, inner], HINT
        x = torch.ones(1) + 1
        assert function_modes() == [*before, outer, inner], HINT
    assert x.item() == 2
    assert function_modes() == before == [], HINT


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_other_module_uses_private_names_of_torch(path):
    if path.name == "torch_internals.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            named = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            named = ast.unparse(node).split(".")
            named = named if named[0] == "torch" else []
        else:
            continue
        assert not any(name.startswith("_") for name in named), ast.unparse(node)
