"""The weight files of a checkpoint: which they are, what their headers say, whether they changed.

Only safetensors files are read, and only from the folder of the checkpoint. Their headers name
every tensor with its shape, so that a cut or unfit file is found without reading weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from safetensors import SafetensorError, safe_open

from prm.digests import digest_file
from prm.models.untrusted import ModelError, listed, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DIGESTS = "model.sha256"
"""Name of the file of digests, in the format of ``sha256sum``: ``sha256sum -c model.sha256``."""
_DIGESTED = ("*.safetensors", "tokenizer.json")
_FLOATS = ["F64", "F32", "F16", "BF16"]
_COUNTS = ("I64", "I32", "BOOL")  # of buffers, such as positions
_TRAINED = (".weight", ".bias")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads from a local folder, without reading them.

    Raises:
        FileNotFoundError: There are none, or one that the index names is missing.
        ModelError: The index is malformed, or names a file outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        if not isinstance(read_object(folder / INDEX).get("metadata"), dict):
            raise ModelError(
                f"{folder / INDEX}: metadata: expected an object, which transformers reads, found "
                'none; add "metadata": {}'
            )
        return index_shards(folder / INDEX)
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    found = f"{listed(pickles)}, which may hold pickles and are never read" if pickles else "none"
    raise FileNotFoundError(
        f"expected *.safetensors ({SINGLE} or {INDEX}) in {folder}, found {found}; save the model "
        "with save_pretrained of transformers, which writes safetensors"
    )


def index_shards(index: Path) -> list[Path]:
    """Return the files that an index names, each once, sorted.

    A link may lead out of the folder, as in the cache of a hub; a name may not.

    Raises:
        FileNotFoundError: A file is missing.
        ModelError: The index has no ``weight_map`` of tensor names to file names in its folder.
    """
    files = [index.parent / name for name in shard_names(index)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"expected {file}, which {index.name} names, found nothing")
    return files


def shard_names(index: Path) -> list[str]:
    """Return the names of ``index_shards``, whether or not the files are there.

    Raises:
        ModelError: As in ``index_shards``.
    """
    where = read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ModelError(
            f"{index}: weight_map: expected an object of tensor names and file names, found "
            f"{'none' if not where else type(where).__name__}; save the model again"
        )
    for name in where.values():
        if not isinstance(name, str) or not _is_plain(name):
            raise ModelError(
                f"{index}: weight_map: expected names of safetensors files in the folder of the "
                f"index, found {name!r}; weights are never read from elsewhere"
            )
    return sorted(set(where.values()))


def _is_plain(name: str) -> bool:
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    return name.endswith(".safetensors") and parts == (name, name) and "\0" not in name


def tensor_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in safetensors files, from their headers.

    Raises:
        ModelError: A file is cut or malformed, or a tensor is in two files.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    shard_of: dict[str, Path] = {}
    for path in files:
        for name, shape in _header(path).items():
            if name in shapes:
                raise ModelError(
                    f"{name} is in {shard_of[name].name} and in {path.name}; expected it once: "
                    "remove the shards that belong to another copy"
                )
            shapes[name], shard_of[name] = shape, path
    return shapes


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: str(one.get_dtype()) for name, one in slices.items()}
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
    except (SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path}: expected a complete safetensors file, found {' '.join(str(error).split())}; "
            "copy or download it again"
        ) from error
    for name, kind in kinds.items():
        if kind not in _FLOATS and (name.endswith(_TRAINED) or kind not in _COUNTS):
            raise ModelError(
                f"{path}: {name}: expected numbers in {listed(_FLOATS)}, found {kind}: quantised "
                "weights are not read, since their numbers mean nothing without their scales; save "
                "the model in one of these types"
            )
    return shapes


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of the weights and the tokenizer in ``folder`` beside them."""
    files = sorted({path for pattern in _DIGESTED for path in folder.glob(pattern)})
    text = "".join(f"{digest_file(path)}  {path.name}\n" for path in files)
    (folder / DIGESTS).write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def unchanged(folder: Path, files: Sequence[Path]) -> Iterator[None]:
    """Compare files with the digests in their folder while the body of the context reads them.

    Hashing runs in a thread beside the body, so that the file is read from disk once. A folder
    without digests is accepted, since only models written here have them.

    Args:
        folder: The folder of the model.
        files: The weight files that are read. The tokenizer is compared, too.

    Raises:
        ModelError: A file is not the one that was written, or the digests are malformed.
    """
    path = folder / DIGESTS
    if not path.is_file():
        yield
        return
    expected = _read_digests(path)
    tokenizer = folder / "tokenizer.json"
    compared = [*files, *([tokenizer] if tokenizer.is_file() else [])]
    missing = sorted({file.name for file in compared} - expected.keys())
    if missing:
        raise ModelError(
            f"{path}: expected the digest of {listed(missing)}, found none; {_on_purpose(path)}"
        )
    with ThreadPoolExecutor(max_workers=1) as pool:
        digests = [(file, pool.submit(digest_file, file)) for file in compared]
        yield
        for file, digest in digests:
            if digest.result() != expected[file.name]:
                raise ModelError(
                    f"{file}: expected the file that was written with the model, found another "
                    f"(SHA-256 {digest.result()[:12]}..., {path.name} says "
                    f"{expected[file.name][:12]}...); copy it again; {_on_purpose(path)}"
                )


def _on_purpose(path: Path) -> str:
    return f"if the model was changed on purpose, remove {path.name}"


def _read_digests(path: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    content = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(content.splitlines(), start=1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if not (name and gap == "  " and set(digest) <= set("0123456789abcdef")):
            raise ModelError(
                f"{path}, line {number}: expected 64 hexadecimal digits, two spaces and a file "
                f"name, found {line[:80]!r}; {_on_purpose(path)}"
            )
        digests[name] = digest
    return digests
