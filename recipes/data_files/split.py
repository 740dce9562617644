"""``data split``: random parts of exact sizes that share no question."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prm.data.questions import Questions, digest, words_of
from prm.data.reader import write_jsonl
from prm.schema import StepExample
from recipes.bad_rows import bad_rows_of, report_bad_rows, skipped_path
from recipes.data_files.convert import examples_of, root_of
from recipes.data_files.options import SplitOptions
from recipes.options.base import MOST_ROWS
from recipes.options.rules import check_together
from recipes.options.values import OptionError, existing_file, shortened
from recipes.run.files import check_writable, complete_directory, refuse_other_kind
from recipes.terminal import say

REST = "rest"


@dataclass(frozen=True)
class Division:
    """What ``split`` has written.

    Attributes:
        parts: The numbers of groups and rows of each part.
        joined: How many groups were joined with another because they share a question.
        images: Whether a row has an image.
        left: The numbers of groups and rows that no part took.
    """

    parts: Mapping[str, tuple[int, int]]
    joined: int
    images: bool
    left: tuple[int, int]


def split(options: SplitOptions) -> Division:
    """Write the parts, all of them or none.

    Rows stay together that have the same ``group`` or the same question (``prm.data.questions``),
    directly or by way of other rows. Rows keep their order and their ids, including ids that were
    generated.

    Raises:
        OptionError: The sizes are impossible (the message names the nearest possible ones), or the
            directory exists.
        DataError: A record cannot be used.
    """
    sizes = parse_parts(options.parts)
    out = Path(options.out)
    for there in (out, skipped_path(out)):
        if there.exists():
            raise OptionError(f"--out {there}: exists; remove it or give another name")
    refuse_other_kind("--out", out)
    if out.suffix.lower() in (".jsonl", ".json"):
        raise OptionError(f"--out {out}: is a directory to make, with a file per part; name one")
    check_writable("--out", out)
    existing_file(options.file)
    check_together(options)
    groups = _Groups()
    bad = bad_rows_of(options, Path(options.file), say)
    for example in examples_of(options, options.file, bad):
        groups.add(example)
    groups.join_equal_pictures()
    rows = groups.rows()
    keys = list(rows)
    drawn = draw([rows[key] if options.unit == "rows" else 1 for key in keys], sizes, options.seed)
    part_of = {key: part for key, part in zip(keys, drawn, strict=True) if part is not None}
    written: dict[str, tuple[int, int]] = {}
    with complete_directory(out) as unfinished:
        for part in sizes:
            mine = {key for key, name in part_of.items() if name == part}
            write_jsonl(
                unfinished / f"{part}.jsonl",
                (
                    example
                    for example in examples_of(options, options.file)
                    if groups.of(example) in mine
                ),
                root_of(options, options.file),
            )
            written[part] = (len(mine), sum(rows[key] for key in mine))
    report_bad_rows([bad], out, say)
    left = [rows[key] for key in keys if key not in part_of]
    return Division(written, groups.joined(len(keys)), groups.images, (len(left), sum(left)))


class _Groups:
    """The rows of a file that have to stay together: the connected parts of groups and questions.

    Pictures are compared by their paths first. Only where the same words come with other paths are
    the files read.
    """

    def __init__(self) -> None:
        self.images = False
        self._count: Counter[int] = Counter()
        self._parent: dict[int, int] = {}
        self._pictures_of: dict[int, dict[tuple[Path, ...], None]] = {}
        self._questions = Questions()

    def add(self, example: StepExample) -> None:
        """Count a row, and join its group with its question."""
        self.images = self.images or bool(example.images)
        words = digest(words_of(example.question))
        self._pictures_of.setdefault(words, {})[example.images] = None
        node = _node(example)
        self._count[node] += 1
        self._join(node, _question_node(words, example.images))

    def join_equal_pictures(self) -> None:
        """Join questions of the same words and pictures whose pictures have other paths."""
        for words, several in self._pictures_of.items():
            if len(several) > 1:
                first: dict[tuple[str, ...], tuple[Path, ...]] = {}
                for images in several:
                    contents = tuple(self._questions.contents(images))
                    same = first.setdefault(contents, images)
                    self._join(_question_node(words, same), _question_node(words, images))

    def rows(self) -> dict[int, int]:
        """Return the number of rows of every joined group, in the order of their first rows."""
        rows: dict[int, int] = defaultdict(int)
        for node, count in self._count.items():
            rows[self._root(node)] += count
        return rows

    def joined(self, left: int) -> int:
        """Return how many groups were joined with others, if ``left`` are left."""
        return len(self._count) - left

    def of(self, example: StepExample) -> int:
        """Return the joined group of a row that was added."""
        return self._root(_node(example))

    def _root(self, node: int) -> int:
        while (parent := self._parent.get(node, node)) != node:
            self._parent[node] = self._parent.get(parent, parent)
            node = parent
        return node

    def _join(self, first: int, second: int) -> None:
        self._parent[self._root(second)] = self._root(first)


def _node(example: StepExample) -> int:
    if example.group is not None:
        return digest(("group", example.group))
    return _question_node(digest(words_of(example.question)), example.images)


def _question_node(words: int, images: Sequence[Path]) -> int:
    return digest(("question", str(words), *map(str, images)))


def parse_parts(parts: Sequence[str]) -> dict[str, int | None]:
    """Return sizes by name from words like ``dev=100`` and ``train=rest`` (None).

    Raises:
        OptionError: A word has another form, a name occurs twice, or there are several rests.
    """
    sizes: dict[str, int | None] = {}
    for word in parts:
        name, equals, size = word.partition("=")
        plain = name.replace("-", "").replace("_", "").isalnum()
        number = int(size) if size.isdecimal() and len(size) <= len(str(MOST_ROWS)) else 0
        if not equals or not plain or not (size == REST or 0 < number <= MOST_ROWS):
            raise OptionError(
                f"--parts {shortened(word)}: expected name=N (whole groups or rows, at most "
                f"{MOST_ROWS:,}) or name=rest"
            )
        if name in sizes:
            raise OptionError(f"--parts {shortened(word)}: the name {shortened(name)} comes twice")
        sizes[name] = None if size == REST else number
    if list(sizes.values()).count(None) > 1:
        raise OptionError("--parts: only one part can take the rest")
    return sizes


def draw(weights: Sequence[int], sizes: Mapping[str, int | None], seed: int) -> list[str | None]:
    """Return the part of every group, so that the weights of a part sum to exactly its size.

    The groups are visited in random order, and each goes to the first part that has room for it. If
    large groups leave a gap in a part, some are exchanged for groups of other sizes
    (``exact_subset``). Without a part for the rest, some groups belong to no part (None).

    Args:
        weights: The number of rows of every group, or ones.
        sizes: The size of every part. None means all that the others leave.
        seed: The seed of the order.

    Raises:
        OptionError: The sizes exceed the total, or no choice of whole groups has that sum.
    """
    asked = sum(size for size in sizes.values() if size is not None)
    if asked > sum(weights):
        raise OptionError(f"--parts: {asked:,} asked for, the file has {sum(weights):,}")
    order = list(range(len(weights)))
    random.Random(seed).shuffle(order)
    rest = next((name for name, size in sizes.items() if size is None), None)
    parts: list[str | None] = [rest] * len(weights)
    for name, size in sizes.items():
        if size is None:
            continue
        chosen = exact_subset([weights[group] for group in order], size)
        if chosen is None:
            raise OptionError(
                f"--parts {name}={size}: no choice of whole groups has exactly {size:,} rows; "
                "give another size, or count groups (--unit groups)"
            )
        for index in chosen:
            parts[order[index]] = name
        taken = set(chosen)
        order = [group for index, group in enumerate(order) if index not in taken]
    if rest is not None and not order:
        raise OptionError(f"--parts {rest}=rest: nothing is left for it")
    return parts


def exact_subset(weights: Sequence[int], total: int) -> list[int] | None:
    """Return indices of weights that sum to ``total``, preferably the first; None if none do.

    Weights are taken in order as long as they fit. If that leaves a gap, the last ones are released
    one by one until weights that are not taken sum to the remainder, which is a bounded knapsack
    problem over distinct weights.
    """
    taken: list[int] = []
    room = total
    for index, weight in enumerate(weights):
        if weight <= room:
            taken.append(index)
            room -= weight
    while room:
        used = set(taken)
        spare: dict[int, list[int]] = defaultdict(list)
        for index, weight in enumerate(weights):
            if index not in used and weight <= room:
                spare[weight].append(index)
        added = _fill(spare, room)
        if added is not None:
            return sorted(taken + added)
        if not taken:
            return None
        room += weights[taken.pop()]
    return taken


def _fill(spare: Mapping[int, Sequence[int]], total: int) -> list[int] | None:
    """Return indices of weights that sum to ``total``; integers hold reachable sums as bits."""
    mask = (1 << (total + 1)) - 1
    kinds = sorted(spare)
    reachable = [1]
    for weight in kinds:
        sums = reachable[-1]
        left, block = len(spare[weight]), 1
        while left:  # Blocks of 1, 2, 4, ... copies.
            copies = min(block, left)
            sums |= (sums << (copies * weight)) & mask
            left -= copies
            block *= 2
        reachable.append(sums)
    if not reachable[-1] >> total & 1:
        return None
    added: list[int] = []
    for kind in range(len(kinds) - 1, -1, -1):
        weight = kinds[kind]
        count = 0
        while not reachable[kind] >> (total - count * weight) & 1:
            count += 1
        added += spare[weight][:count]
        total -= count * weight
    return added
