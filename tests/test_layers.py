"""Who imports whom, what is documented, what a wheel holds."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[1]
CORE = ("bilevel", "weighting", "prm")
PACKAGES = (*CORE, "recipes")
MODULES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
ALLOWED = {
    "bilevel": {"torch", "torchopt", "optree", "jaxtyping"},
    "weighting": {"torch", "safetensors", "jaxtyping"},
    "prm": {"torch", "transformers", "jinja2", "PIL", "numpy", "safetensors", "peft", "jaxtyping"},
    "recipes": {
        *(*CORE, "torch", "torchopt", "optree", "transformers", "tokenizers", "safetensors"),
        *("PIL", "numpy", "sklearn", "yaml", "tqdm"),
    },
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_layers_import_what_they_may(path):
    package = path.relative_to(ROOT).parts[0]
    assert set(imported(path)) <= {package, *ALLOWED[package], *sys.stdlib_module_names}


def test_the_check_sees_imports_inside_functions(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("import torch\ndef f():\n    from prm.model import load_prm\n")
    assert set(imported(module)) == {"torch", "prm"}


def loaded(code: str) -> set[str]:
    """Which of the heavy packages are loaded after ``code``."""
    heavy = ["torch", "transformers", "PIL", "numpy", "sklearn", "prm", "weighting", "recipes"]
    code += f"\nimport sys; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_core_loads_alone():
    assert not loaded("import bilevel") & {"transformers", "PIL", "prm", "weighting", "recipes"}
    assert not loaded("import weighting") & {"transformers", "PIL", "prm", "recipes"}


def test_help_and_options_load_nothing_heavy():
    assert loaded("import recipes.options.train") == {"recipes"}
    helps = "from recipes.__main__ import main\n"
    commands = ["train", "cold-start", "score", "select", "evaluate", "weigh", "compare"]
    for command in (*([name] for name in commands), ["data", "embedded"]):
        helps += f"try: main({[*command, '--help']})\nexcept SystemExit: pass\n"
    assert loaded(helps) == {"recipes"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_things_are_documented(path):
    module = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py" or module.body:
        assert ast.get_docstring(module), path
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in module.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    assert ast.get_docstring(member), f"{path}: {node.name}.{member.name}"


@pytest.fixture(scope="module")
def wheel_files() -> set[str]:
    """What setuptools would put into a wheel, by setup.cfg alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        distribution = Distribution({"script_name": "setup.py"})
        distribution.parse_config_files(["setup.cfg"])
        build = distribution.get_command_obj("build_py")
        build.ensure_finalized()
        files = {path for _, _, path in build.find_all_modules()}
        for _, source, _, names in build.data_files:
            files |= {f"{source}/{name}" for name in names}
    return files


def declared() -> set[str]:
    """Distributions that setup.cfg asks for, extras included."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    lines = setup["options"]["install_requires"] + extras["demo"] + extras["peft"]
    return {re.split("[<>=!~]", line)[0] for line in lines.split()}


def test_every_package_that_is_imported_is_declared():
    names = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    outside = {name for path in MODULES for name in imported(path)}
    outside -= {*PACKAGES, *sys.stdlib_module_names}
    assert {names.get(name, name) for name in outside} == declared()


def test_wheel_holds_every_module_and_no_other(wheel_files):
    assert {name for name in wheel_files if name.endswith(".py")} == set(map(name_of, MODULES))


def test_wheel_holds_presets_types_and_the_base_model(wheel_files):
    data = {name for name in wheel_files if not name.endswith(".py")}
    expected = {f"{package}/py.typed" for package in PACKAGES}
    expected |= {name_of(path) for path in (ROOT / "recipes" / "presets").glob("*.yaml")}
    expected |= {name_of(path) for path in (ROOT / "recipes" / "assets" / "base").iterdir()}
    assert data == expected
    assert "recipes/presets/train-net.yaml" in data
    assert "recipes/assets/base/model.safetensors" in data


def test_package_data_is_found_where_the_code_looks():
    package = resources.files("recipes")
    assert package.joinpath("assets", "base", "config.json").is_file()
    assert package.joinpath("presets", "train-net.yaml").is_file()
    for name in PACKAGES:
        assert resources.files(name).joinpath("py.typed").is_file()
