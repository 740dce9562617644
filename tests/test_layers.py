"""Who imports whom, what is documented, what a wheel holds."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
    "prm": {
        "torch",
        "transformers",
        "jinja2",
        "PIL",
        "numpy",
        "safetensors",
        "peft",
        "jaxtyping",
        "math_verify",
        "pyarrow",
        "zstandard",
    },
    "recipes": {
        *(*CORE, "torch", "torchopt", "optree", "transformers", "tokenizers", "safetensors"),
        *("PIL", "numpy", "sklearn", "yaml", "tqdm", "filelock", "fastapi", "uvicorn"),
        *("jinja2", "matplotlib", "pyarrow", "huggingface_hub"),
        *("trackio", "wandb"),
    },
}


LAYERS = {
    "bilevel": (
        ("tree", "checks", "module_copy", "profiling"),
        ("problem", "optimizers", "functional", "inputs", "collective"),
        ("autodiff", "state", "replicas"),
        ("lower",),
        ("routes",),
        ("hypergradients", "shards"),
        ("solver",),
        ("audit", "fit", "resident"),
    ),
    "prm": (
        ("data_urls", "signatures"),
        ("schema", "names", "files"),
        ("losses", "aggregations", "evaluation", "inputs", "digests"),
        ("conventions",),
        ("data", "models", "tensor_cache"),
        ("batches",),
        ("activations", "placement", "scoring"),
        ("rewards",),
    ),
    "weighting": (
        ("bounds", "files", "heuristics", "normalise"),
        ("base",),
        ("features", "gradients", "instance_net", "labels", "tables", "travel"),
        ("store",),
    ),
    "recipes": (
        ("bad_rows", "options", "profiling", "stopping", "tensor_file", "terminal"),
        ("ranks", "models"),
        ("run", "evaluation", "method"),
        ("data_files", "embedded", "problems", "report", "train"),
        ("comparison", "serve", "use"),
        ("commands",),
        ("command_line",),
        ("__main__", "evidence"),
    ),
}
"""Modules and folders of a package, lowest first: each imports only what stands above its line."""

Documented = ast.Module | ast.FunctionDef | ast.ClassDef

MOST_MODULES = 12
MOST_FLOORS = 8


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports_of(path: Path) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """The imports of a module, wherever in it, which is parsed once for all tests."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a module imports, wherever in it."""
    for node in imports_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        else:
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module.partition(".")[0]


def test_layers_import_what_they_may():
    wrong = {}
    for path in MODULES:
        package = path.relative_to(ROOT).parts[0]
        wrong[path] = {*imported(path)} - {package, *ALLOWED[package], *sys.stdlib_module_names}
    assert {name_of(path): names for path, names in wrong.items() if names} == {}


def rooms_of(folder: Path) -> dict[str, set[str]]:
    """Modules and folders in a folder, each with those of the same folder that it imports."""
    dotted = ".".join(folder.relative_to(ROOT).parts)
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).with_suffix("").parts[0]
        if path == folder / "__init__.py":
            continue  # it says what is public, of whatever layer
        found.setdefault(name, set()).update(
            rest.partition(".")[0]
            for module in modules_imported(path)
            if (rest := module.removeprefix(f"{dotted}.")) != module
        )
    return {name: others & (found.keys() - {name}) for name, others in found.items()}


def modules_imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it; of ``from a import b`` also ``a.b``."""
    for node in imports_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floors(rooms: dict[str, set[str]]) -> list[set[str]]:
    """The rooms in layers, each importing only from those before; a circle is an error."""
    layers: list[set[str]] = []
    remaining = dict(rooms)
    while remaining:
        free = {name for name, others in remaining.items() if not others & remaining.keys()}
        assert free, f"these import each other in a circle: {sorted(remaining)}"
        layers.append(free)
        remaining = {name: others for name, others in remaining.items() if name not in free}
    return layers


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_only_lower_layers(package):
    rooms, layers = rooms_of(ROOT / package), LAYERS[package]
    assert sorted(rooms) == sorted(name for layer in layers for name in layer)
    below: set[str] = set()
    for layer in layers:
        for name in layer:
            assert rooms[name] <= below, f"{package}.{name} imports {sorted(rooms[name] - below)}"
        below |= {*layer}


FOLDERS = sorted({path.parent for path in MODULES})


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_no_folder_is_a_hall(folder):
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES
    assert len(floors(rooms_of(folder))) <= MOST_FLOORS


def test_the_check_sees_floors_and_circles():
    assert floors({"a": set(), "b": {"a"}, "c": {"a", "b"}}) == [{"a"}, {"b"}, {"c"}]
    with pytest.raises(AssertionError, match="circle"):
        floors({"a": {"b"}, "b": {"a"}})


def test_tests_mirror_the_packages():
    """A folder of tests is named like the folder whose modules it tests."""
    apart = {"tests", "tests/fuzz", "tests/invariants", "tests/examples"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = name_of(path.parent)
        if folder not in apart:
            assert (ROOT / folder.removeprefix("tests/")).is_dir(), folder


HELPERS = [path for path in (ROOT / "tests").rglob("*.py") if path.name.startswith("test_")]


def test_no_test_module_is_imported():
    """What several test modules share lies in a helper module, not in one of them."""
    found = [(name_of(path), module) for path in HELPERS for module in modules_imported(path)]
    assert [pair for pair in found if re.search(r"\btests\b.*\.test_", pair[1])] == []


def test_the_check_sees_imports_inside_functions(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("import torch\ndef f():\n    from prm.model import load_prm\n")
    assert set(imported(module)) == {"torch", "prm"}


def loaded(*codes: str) -> list[set[str]]:
    """Which of the heavy packages are loaded after each code, of one process."""
    heavy = ["torch", "transformers", "PIL", "numpy", "sklearn", "prm", "weighting", "recipes"]
    tell = f"import sys; print('## loaded', *(m for m in {heavy} if m in sys.modules))"
    code = "".join(f"{code}\n{tell}\n" for code in codes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return [set(words[2:]) for words in lines if words[:2] == ["##", "loaded"]]


def test_the_core_loads_alone():
    first, both = loaded("import bilevel", "import weighting")
    assert not first & {"transformers", "PIL", "prm", "weighting", "recipes"}
    assert not both & {"transformers", "PIL", "prm", "recipes"}
    assert "weighting" in both


def test_help_and_options_load_nothing_heavy():
    names = {"recipes", "prm"}  # of prm its list of names alone, without torch
    helps = "from recipes.__main__ import main\n"
    commands = ["train", "cold-start", "score", "select", "evaluate", "weigh", "compare"]
    commands += ["serve", "parity"]
    for command in (*([name] for name in commands), ["data", "embedded"]):
        helps += f"try: main({[*command, '--help']})\nexcept SystemExit: pass\n"
    assert loaded("import recipes.options.train", helps) == [names, names]


def public_things(path: Path) -> Iterator[tuple[str, Documented]]:
    """A module, and its public functions, classes and their methods, by name."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py" or module.body:
        yield name_of(path), module
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in module.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield f"{name_of(path)}: {node.name}", node
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield f"{name_of(path)}: {node.name}.{member.name}", member


def test_public_things_are_documented():
    things = [thing for path in MODULES for thing in public_things(path)]
    assert [name for name, node in things if not ast.get_docstring(node)] == []
    assert len(things) > len(MODULES)


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
    lines = setup["options"]["install_requires"]
    names = ("demo", "peft", "math", "datasets", "report", "serve", "trackio", "wandb")
    lines += "".join(extras[name] for name in names)
    return {re.split("[<>=!~]", line)[0] for line in lines.split()}


def test_every_package_that_is_imported_is_declared():
    names = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
    names["math_verify"] = "math-verify"
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
    expected.add("recipes/report/page.html.j2")
    assert data == expected
    assert "recipes/presets/train-net.yaml" in data
    assert "recipes/assets/base/model.safetensors" in data


def test_package_data_is_found_where_the_code_looks():
    package = resources.files("recipes")
    assert package.joinpath("assets", "base", "config.json").is_file()
    assert package.joinpath("presets", "train-net.yaml").is_file()
    for name in PACKAGES:
        assert resources.files(name).joinpath("py.typed").is_file()
