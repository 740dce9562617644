"""Solutions that begin alike as one sequence: a tree of their tokens, each token computed once.

The candidates of a question share its pictures and its text, and often their first steps. In a
causal model a token depends on the tokens before it alone, so what they share can be computed once:
the sequences are laid out as a tree, a token stands at its depth, and sees its ancestors and
itself. The outputs at its places are those of the sequences, up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from prm.inputs.collate import TREE_POSITIONS, Batch, Collator, EncodedExample

MOST_NODES = 8192
"""The largest number of tokens of a tree: its mask then has 64 MiB."""

_LANGUAGE_MODELS = ("llama", "qwen2", "qwen3")
"""Types of language models that attend as a mask says, whatever the tokens, and turn by places."""


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


def tree_width(config: Any) -> int | None:
    """Return the hidden size of the language model, if the model computes trees, else None.

    One with full causal attention by torch's kernels does. Others would need more than a mask and
    places: sliding windows, pictures whose tokens see each other, places of more than one axis.

    Args:
        config: The configuration of a model.
    """
    text = config.get_text_config()
    takes = (
        text.model_type in _LANGUAGE_MODELS
        and config.model_type in ("internvl", text.model_type)
        and text._attn_implementation == "sdpa"
        and set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )
    return int(text.hidden_size) if takes else None


def prefix_groups(
    rows: Sequence[EncodedExample], picture: int | None, width: int, most: int
) -> list[tuple[list[int], int]]:
    """Return which sequences share a tree, each group with the number of its tree's tokens.

    Only solutions of one question with the same pictures do. A sequence joins a tree where that
    takes fewer operations than to compute it alone. In units of four multiplications and additions
    per layer, ``s`` tokens take about 6·width·s in the matrices of a layer, and s² in attention.

    Args:
        rows: The sequences.
        picture: The token of a picture, None for a model without. A tree has its pictures once, so
            that they stand in what all its sequences share.
        width: The hidden size of the language model.
        most: The largest number of sequences of a tree.

    Returns:
        The numbers of the sequences of every group, in the order of their tokens; groups by their
        first sequence. A sequence that shares nothing is alone.
    """
    candidates: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        candidates[row.example.images, row.example.question].append(number)
    groups = [
        group
        for numbers in candidates.values()
        for group in _joined({n: rows[n].input_ids.tolist() for n in numbers}, picture, width, most)
    ]
    return sorted(groups, key=lambda group: min(group[0]))


def _joined(
    tokens: Mapping[int, list[int]], picture: int | None, width: int, most: int
) -> Iterator[tuple[list[int], int]]:
    """Yield the groups of sequences of one question, by their numbers, with their nodes."""
    members: list[int] = []
    nodes = 0
    for number in sorted(tokens, key=lambda number: tokens[number]):
        own = tokens[number]
        shared = _shared(tokens[members[-1]], own) if members else 0
        new = len(own) - shared
        together = 6 * width * new + (nodes + new) ** 2 - nodes**2
        alone = 6 * width * len(own) + len(own) ** 2
        fits = len(members) < most and nodes + new <= MOST_NODES
        if members and (together >= alone or picture in own[shared:] or not fits):
            yield members, nodes
            members, nodes, new = [], 0, len(own)
        members = [*members, number]
        nodes += new
    yield members, nodes


def tree_batch(collator: Collator, groups: Sequence[Sequence[EncodedExample]]) -> Batch:
    """Return the batch of groups of sequences, each group as one tree.

    It holds, beside the pictures of each tree and the targets of the rows, which are those of the
    groups one after the other:

    ==================  ================================  ========================================
    ``input_ids``       [trees, nodes] long
    ``attention_mask``  [trees, 1, nodes, nodes] bool     True where a token attends to another
    ``position_ids``    [trees, nodes] long               the depth of each token
    ``tree_positions``  [batch, steps] long               ``label_positions`` in [trees · nodes]
    ==================  ================================  ========================================

    Args:
        collator: What reads the pictures.
        groups: The sequences of every tree, in the order of ``prefix_groups``.

    Raises:
        DataError: An image cannot be decoded.
    """
    trees = [_tree(group) for group in groups]
    stand_ins = [
        replace(group[0], input_ids=tree.tokens) for group, tree in zip(groups, trees, strict=True)
    ]
    batch = collator.sequences(stand_ins)
    del batch["label_positions"], batch["num_patches"]
    shape = batch["input_ids"].shape
    batch["position_ids"] = torch.zeros(shape, dtype=torch.long)
    sees = torch.eye(shape[1], dtype=torch.bool).repeat(len(trees), 1, 1)  # also of padding
    for number, tree in enumerate(trees):
        nodes = len(tree.tokens)
        batch["position_ids"][number, :nodes] = tree.depths
        sees[number, :nodes, :nodes] = tree.sees
    batch["attention_mask"] = sees[:, None]
    rows = [row for group in groups for row in group]
    batch |= collator.targets(rows)
    positions = torch.zeros(batch["step_mask"].shape, dtype=torch.long)
    paths = (number * shape[1] + path for number, tree in enumerate(trees) for path in tree.paths)
    for number, (row, path) in enumerate(zip(rows, paths, strict=True)):
        positions[number, : len(row.label_positions)] = path[row.label_positions]
    return batch | {TREE_POSITIONS: positions}


def _tree(rows: Sequence[EncodedExample]) -> _Tree:
    tokens: list[int] = []
    paths: list[Tensor] = []
    before: list[int] = []
    for row in rows:
        own = row.input_ids.tolist()
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
