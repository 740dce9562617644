"""Solutions that begin alike as one sequence: a tree of their tokens, each token computed once.

The candidates of a question share its pictures and its text, and often their first steps. In a
causal model a token depends on the tokens before it alone, so what they share can be computed once:
the sequences are laid out as a tree, a token stands at its depth, and sees its ancestors and
itself. The outputs at its places are those of the sequences, up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from prm.inputs.collate import TREE_POSITIONS, Batch, Collator, EncodedExample
from prm.inputs.tokens import ImageTokens

MOST_NODES = 8192
"""The largest number of tokens of a tree: its mask then has 64 MiB."""


@dataclass(frozen=True, eq=False)
class _Tree:
    """The tokens of some sequences, each common beginning once; parents stand before children.

    Attributes:
        tokens: The token of every node.
        depths: Its place in its sequences.
        sees: Whether the row's node attends to the column's: its ancestors and itself.
        paths: The nodes of each sequence.
    """

    tokens: Int32[Tensor, " nodes"]
    depths: Int64[Tensor, " nodes"]
    sees: Bool[Tensor, "nodes nodes"]
    paths: list[Int64[Tensor, " seq"]]


def prefix_groups(
    rows: Sequence[EncodedExample],
    image_tokens: ImageTokens | None,
    width: int,
    *,
    most: int | None = None,
    room: Sequence[int] | None = None,
) -> list[tuple[list[int], int]]:
    """Return which sequences share a tree, each group with the number of its tree's tokens.

    Only solutions of one question with the same pictures do. A sequence joins a tree where that
    takes fewer operations than to compute it alone. In units of four multiplications and additions
    per layer, ``s`` tokens take about 6·width·s in the matrices of a layer, and s² in attention.

    Args:
        rows: The sequences.
        image_tokens: The tokens of a picture, None for a model without. A tree has its pictures
            once, so that they stand in what all its sequences share.
        width: The hidden size of the language model.
        most: The largest number of sequences of a tree, None for any.
        room: The largest number of tokens of a tree with each row, None for ``MOST_NODES``.

    Returns:
        The numbers of the sequences of every group, in the order of their tokens; groups by their
        first sequence. A sequence that shares nothing is alone.
    """
    picture = None if image_tokens is None else image_tokens.context_id
    candidates: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        candidates[row.example.images, row.example.question].append(number)
    groups: list[tuple[list[int], int]] = []
    for numbers in candidates.values():
        if len(numbers) == 1:
            groups.append((numbers, len(rows[numbers[0]].input_ids)))
            continue
        tokens = {number: rows[number].input_ids.tolist() for number in numbers}
        free = MOST_NODES if room is None else min(MOST_NODES, *(room[n] for n in numbers))
        members: list[int] = []
        nodes = 0
        for number in sorted(numbers, key=lambda number: tokens[number]):
            own = tokens[number]
            shared = _shared(tokens[members[-1]], own) if members else 0
            new = len(own) - shared
            together = 6 * width * new + (nodes + new) ** 2 - nodes**2
            alone = 6 * width * len(own) + len(own) ** 2
            fits = nodes + new <= free and (most is None or len(members) < most)
            if not members or together >= alone or picture in own[shared:] or not fits:
                members, nodes = [], 0
                new = len(own)
                groups.append((members, 0))
            members.append(number)
            nodes += new
            groups[-1] = (members, nodes)
    return sorted(groups, key=lambda group: min(group[0]))


def question_batch(collator: Collator, rows: Sequence[EncodedExample], width: int) -> Batch:
    """Return the batch of some solutions in their order, of those of a question as trees.

    It is the collator's where trees would not make it smaller.

    Args:
        collator: What pads a batch, and reads the pictures.
        rows: The solutions.
        width: What ``PRM.tree_width`` says of the model.

    Raises:
        DataError: An image cannot be decoded.
    """
    groups = prefix_groups(rows, collator.prompt.image_tokens, width)
    longest = max(nodes for _, nodes in groups)
    smaller = len(groups) * longest < len(rows) * max(len(row.input_ids) for row in rows)
    if not smaller or len(groups) * longest**2 > MOST_NODES**2:
        return collator(rows)
    return tree_batch(collator, rows, [numbers for numbers, _ in groups])


def tree_batch(
    collator: Collator, rows: Sequence[EncodedExample], groups: Sequence[Sequence[int]]
) -> Batch:
    """Return the batch of some solutions in their order, each group of them as one tree.

    It holds, beside the pictures of each tree and the targets of the rows:

    ==================  ================================  ========================================
    ``input_ids``       [trees, nodes] long
    ``attention_mask``  [trees, 1, nodes, nodes] bool     True where a token attends to another
    ``position_ids``    [trees, nodes] long               the depth of each token
    ``tree_positions``  [batch, steps] long               ``label_positions`` in [trees · nodes]
    ==================  ================================  ========================================

    Args:
        collator: What reads the pictures.
        rows: The solutions.
        groups: The numbers of the solutions of every tree, as ``prefix_groups`` says.

    Raises:
        DataError: An image cannot be decoded.
    """
    trees = [_tree([rows[number].input_ids.tolist() for number in numbers]) for numbers in groups]
    batch = collator.sequences(
        [
            replace(rows[numbers[0]], input_ids=tree.tokens)
            for numbers, tree in zip(groups, trees, strict=True)
        ]
    )
    del batch["label_positions"], batch["num_patches"]
    shape = batch["input_ids"].shape
    batch["position_ids"] = torch.zeros(shape, dtype=torch.long)
    sees = torch.eye(shape[1], dtype=torch.bool).repeat(len(trees), 1, 1)  # also of padding
    batch |= collator.targets(rows)
    positions = torch.zeros(batch["step_mask"].shape, dtype=torch.long)
    for place, (numbers, tree) in enumerate(zip(groups, trees, strict=True)):
        nodes = len(tree.tokens)
        batch["position_ids"][place, :nodes] = tree.depths
        sees[place, :nodes, :nodes] = tree.sees
        for number, path in zip(numbers, tree.paths, strict=True):
            labels = path[rows[number].label_positions]
            positions[number, : len(labels)] = place * shape[1] + labels
    return batch | {"attention_mask": sees[:, None], TREE_POSITIONS: positions}


def _tree(sequences: Sequence[list[int]]) -> _Tree:
    tokens: list[int] = []
    paths: list[Tensor] = []
    before: list[int] = []
    for own in sequences:
        shared = _shared(before, own)
        new = torch.arange(len(tokens), len(tokens) + len(own) - shared)
        paths.append(torch.cat([paths[-1][:shared], new]) if paths else new)
        tokens += own[shared:]
        before = own
    depths = torch.zeros(len(tokens), dtype=torch.long)
    sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for path in paths:
        depths[path] = torch.arange(len(path))
        sees[path[:, None], path] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return _Tree(torch.tensor(tokens, dtype=torch.int32), depths, sees, paths)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    size = min(len(one), len(other))
    return next((place for place in range(size) if one[place] != other[place]), size)
