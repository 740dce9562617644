"""What the package is made of: torch and its companions, every public name, nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import bilevel


def test_every_public_name_resolves():
    assert len(set(bilevel.__all__)) == len(bilevel.__all__)
    for name in bilevel.__all__:
        assert getattr(bilevel, name) is not None


def test_a_star_import_leaves_the_names_of_others():
    code = (
        "from math import log\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "found = log, checkpoint\n"
        "from bilevel import *\n"
        "print(found == (log, checkpoint), fit.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True fit"
    for name in ("checkpoint", "log", "losses", "progress"):
        assert callable(getattr(bilevel, name))


def test_importing_needs_no_transformers():
    code = "import sys, bilevel; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_only_torch_and_its_companions_are_imported():
    allowed = {"bilevel", "jaxtyping", "optree", "torch", "torchopt", *sys.stdlib_module_names}
    for path in Path(bilevel.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, path
