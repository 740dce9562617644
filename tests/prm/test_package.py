from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import prm


def test_importing_the_package_is_cheap():
    code = "import sys, prm; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_names_to_choose_from_are_cheap():
    code = "import sys, prm.names; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_and_selecting_need_no_transformers():
    code = (
        "import sys, prm; prm.read_jsonl, prm.best_of_n, prm.roc_auc, prm.Collator, prm.load_prm; "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_resolves():
    assert dir(prm) == sorted(prm.__all__)
    for name in prm.__all__:
        assert getattr(prm, name) is not None


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(prm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"prm.{module}" for name, module in prm._HOME.items()}
