"""Checks that the images of records exist, are readable, and lie in the folder of the images.

Each path is checked once. Records may come from other people's files, so by default they reach no
image outside the folder that the user named.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prm.data.interned import Interned
from prm.data.record_fields import is_below
from prm.data_urls import is_embedded, opened, picture_key, shown
from prm.names import ImageCheck
from prm.schema import DataError

SAMPLE = 1_000
"""How many images the check "sample" decodes."""

Fault = Literal["outside", "missing", "unreadable"]
_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8\xff": b"\xff\xd9"}
_TAIL = 64


@dataclass(frozen=True)
class ImageProblem:
    """Why an image cannot be used.

    Attributes:
        fault: What kind of problem.
        expected: What the field should have named.
        found: What is there instead.
        remedy: What to change.
    """

    fault: Fault
    expected: str
    found: str
    remedy: str


class ImageFiles:
    """Check image paths, each path once (memory: the bytes of each distinct path).

    Args:
        root: Folder in which the images have to lie after symbolic links are followed.
        allow_outside: Accept images outside this folder, too.
        check: How closely to check a file.
    """

    def __init__(
        self, root: Path, *, allow_outside: bool = False, check: ImageCheck = "exists"
    ) -> None:
        self._root = os.path.abspath(root)
        self._real_root = os.path.realpath(root)
        self._allow_outside = allow_outside
        self._check = check
        self._fine = Interned()
        self._problems: dict[str, ImageProblem] = {}
        self._real_folders: dict[str, str] = {}

    @property
    def problems(self) -> dict[str, ImageProblem]:
        """The problem of every path that has one."""
        return self._problems

    @property
    def count(self) -> int:
        """The number of different paths that have been checked."""
        return len(self._fine) + len(self._problems)

    def problem(self, image: Path) -> ImageProblem | None:
        """Return why ``image`` cannot be used, or None if it can."""
        path = picture_key(image)
        if path in self._fine:
            return None
        if path not in self._problems:
            problem = self._look(str(image))
            if problem is None:
                self._fine.add(path)
                return None
            self._problems[path] = problem
        return self._problems[path]

    def _look(self, path: str) -> ImageProblem | None:
        if is_embedded(Path(path)):
            return self._read(Path(path))
        try:
            if not self._allow_outside and self._is_outside(path):
                return ImageProblem(
                    "outside",
                    f"an image below {self._root}",
                    path,
                    "set the image root to a folder that holds all images, or allow images "
                    "outside (allow_outside_images)",
                )
            is_file = os.path.isfile(path)
        except ValueError as error:  # a null byte
            return _missing(f"a path with an {error}")
        if not is_file:
            return _missing(f"{'a folder' if os.path.isdir(path) else 'no file'} at {path}")
        return self._read(Path(path))

    def _is_outside(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], name)
        if os.path.islink(path):
            real = os.path.realpath(path)
        return not is_below(real, self._real_root)

    def _read(self, path: Path) -> ImageProblem | None:
        if self._check == "exists":
            return None
        # Imported here so that Pillow is loaded only for a check of more than existence.
        from prm.inputs.tiles import image_size, read_image

        first = self._check == "sample" and self.count < SAMPLE
        try:
            if self._check == "decode" or first:
                read_image(path)
            else:
                image_size(path)
                if _looks_cut_off(path):
                    read_image(path)
        except DataError as error:
            remedy = error.remedy or _REMEDY
            return ImageProblem(
                "unreadable", "a readable image file", f"{error.found} in {shown(path)}", remedy
            )
        return None


_REMEDY = "check the path; image paths are relative to image_root"


def _missing(found: str) -> ImageProblem:
    return ImageProblem("missing", "a readable image file", found, _REMEDY)


def _looks_cut_off(path: Path) -> bool:
    """Whether a PNG or JPEG file lacks its end mark; only decoding shows whether that matters."""
    try:
        with opened(path) as file:
            start = file.read(4)
            end = next((mark for sign, mark in _ENDS.items() if start.startswith(sign)), None)
            if end is None:
                return False
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            return end not in file.read()
    except OSError as error:
        raise DataError(expected="a readable file", found=str(error), file=path) from error
