from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType, GenericAlias

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


def test_names_come_from_the_modules_that_define_them():
    for name in prm.__all__:
        thing = getattr(prm, name)
        if isinstance(thing, (type, FunctionType)) and not isinstance(thing, GenericAlias):
            assert thing.__module__ == prm._HOMES[name], name
    assert prm.PRM is import_module("prm.models.model").PRM
    assert prm.best_of_n is import_module("prm.evaluation.select").best_of_n


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(prm.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    aliases = [alias for node in block.body for alias in node.names]
    assert sorted(alias.name for alias in aliases) == prm.__all__
    assert all(alias.asname == alias.name for alias in aliases)  # "as": a re-export (PEP 484)
