"""Semantic IDs as text and as a trie (METHOD 2): the language in which a model names items.

An item's ID is one code a level. Level 0 has the letter a, level 1 the letter b, and so on, so that `(12, 240, 7, 3)` is written
`<a_12><b_240><c_7><d_3>` and each part is one token of the model's vocabulary.

Shapes: N items, L levels, B nodes (beams), K codes of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gr2.context import Context
from gr2.errors import InputError

LETTERS = "abcdefghij"
MAX_LEVELS = len(LETTERS)

Ints = NDArray[np.int64]


def token(level: int, code: int) -> str:
    """The token of one code at one level (from 0). Raises ValueError for a level without a letter or a negative code."""
    if not 0 <= level < MAX_LEVELS or code < 0:
        raise ValueError(f"no token for level {level}, code {code}: levels go from 0 to {MAX_LEVELS - 1}, codes from 0")
    return f"<{LETTERS[level]}_{code}>"


def sid_tokens(levels: int, codes: int) -> list[str]:
    """Every token of a tokenizer, level by level: the token of (level, code) stands at place level * codes + code."""
    return [token(level, code) for level in range(levels) for code in range(codes)]


def to_text(codes: Sequence[int]) -> str:
    """The written form of one item's codes. Raises ValueError for no codes, too many or a negative one."""
    if len(codes) == 0:
        raise ValueError("an item has at least one code")
    return "".join(token(level, int(code)) for level, code in enumerate(codes))


def live_codes(ctx: Context) -> tuple[list[str], Ints]:
    """The items in order of id, and their codes (N, L), under the current tokenizer. Raises InputError if the table holds none of it."""
    version = ctx.model("tokenizer").id
    table = ctx.lake.read("semantic_ids", ["item_id", "codes"], order_by=["item_id"], tokenizer=version)
    if not table.num_rows:
        raise InputError(f"semantic_ids holds no codes of {version}: run `gr2 stage semantic_ids` first")
    return table["item_id"].to_pylist(), np.array(table["codes"].to_pylist(), dtype=np.int64)


@dataclass(frozen=True)
class Trie:
    """All IDs as a trie in compressed rows, for constrained decoding without Python loops over nodes.

    A node at depth d (0: the root) is an integer from 0, in lexicographic order of the path that leads to it. Its children are
    the places `starts[d][node] .. starts[d][node + 1]` of `tokens[d]`, in ascending order of code; **a child's place is also its
    node number at depth d + 1**. So one step of B beams is:

        first, last = trie.starts[d][nodes], trie.starts[d][nodes + 1]      # range of children of every node
        rows, codes, children = trie.children(d, nodes)                     # or all of them, flat; rows: which beam
        node = trie.child(d, nodes, codes)                                  # or the child by a given code, -1 where there is none

    A node at depth L is a leaf: `items[leaf]` is the row of the item in the array that the trie was built from.
    """

    starts: tuple[Ints, ...]  # L arrays; starts[d] has one entry more than there are nodes at depth d
    tokens: tuple[Ints, ...]  # L arrays; tokens[d][k]: the code that leads to node k at depth d + 1
    items: Ints  # (N,) leaf -> row of codes_NL

    @classmethod
    def build(cls, codes_NL: NDArray[np.integer]) -> "Trie":
        """Builds the trie. Raises ValueError unless codes are an (N, L) array of codes from 0, each row once (a bijection)."""
        codes_NL = np.asarray(codes_NL, dtype=np.int64)
        if codes_NL.ndim != 2 or 0 in codes_NL.shape:
            raise ValueError(f"codes must be an array of items by levels, not of shape {codes_NL.shape}")
        if codes_NL.min() < 0:
            raise ValueError("codes start at 0")
        items = np.lexsort(codes_NL.T[::-1])
        sorted_NL = codes_NL[items]
        node_N = np.zeros(len(items), dtype=np.int64)  # node at the current depth that each sorted row passes through
        starts, tokens = [], []
        for level in range(codes_NL.shape[1]):
            new_N = np.ones(len(items), dtype=bool)
            new_N[1:] = (np.diff(node_N) != 0) | (np.diff(sorted_NL[:, level]) != 0)
            counts = np.bincount(node_N[new_N], minlength=int(node_N[-1]) + 1)
            starts.append(np.concatenate([[0], np.cumsum(counts)]))
            tokens.append(sorted_NL[new_N, level])
            node_N = np.cumsum(new_N) - 1
        if len(tokens[-1]) != len(items):
            raise ValueError(f"{len(items) - len(tokens[-1])} items share all codes with another: separate them first")
        return cls(tuple(starts), tuple(tokens), items)

    @property
    def levels(self) -> int:
        """L: the depth of the leaves."""
        return len(self.tokens)

    @cached_property
    def largest_code(self) -> int:
        """The largest code of any level."""
        return max(int(codes.max()) for codes in self.tokens)

    @cached_property
    def leaf_of(self) -> Ints:
        """(N,) the leaf of each row of the array that the trie was built from."""
        leaf_N = np.empty(len(self.items), dtype=np.int64)
        leaf_N[self.items] = np.arange(len(self.items))
        return leaf_N

    @cached_property
    def parents(self) -> tuple[Ints, ...]:
        """For depth 1..L: the node of the depth before that leads to each node."""
        return tuple(np.repeat(np.arange(len(starts) - 1), np.diff(starts)) for starts in self.starts)

    @cached_property
    def above(self) -> tuple[Ints, ...]:
        """For depth 1..L: (N,) the node of that depth above each leaf."""
        found = [np.arange(len(self.items))]
        for parents in self.parents[:0:-1]:
            found.insert(0, parents[found[0]])
        return tuple(found)

    @cached_property
    def below(self) -> tuple[Ints, ...]:
        """For depth 1..L: how many leaves lie below each node."""
        return tuple(np.bincount(node_N) for node_N in self.above)

    def children(self, depth: int, nodes_B: NDArray[np.integer]) -> tuple[Ints, Ints, Ints]:
        """All children of nodes at a depth, flat: `(rows, codes, children)`, in order of `nodes_B`, then of code.

        `rows` says which entry of `nodes_B` each child belongs to; `children` are node numbers at depth + 1.
        """
        first_B = self.starts[depth][nodes_B]
        counts_B = self.starts[depth][np.asarray(nodes_B) + 1] - first_B
        rows = np.repeat(np.arange(len(counts_B)), counts_B)
        before_B = np.cumsum(counts_B) - counts_B
        children = np.arange(len(rows)) - before_B[rows] + first_B[rows]
        return rows, self.tokens[depth][children], children

    def child(self, depth: int, nodes_B: NDArray[np.integer], codes_B: NDArray[np.integer]) -> Ints:
        """(B,) node at depth + 1 that a code leads to from each node; -1 where the trie has no such child, or the node is -1."""
        nodes_B, codes_B = np.asarray(nodes_B, dtype=np.int64), np.asarray(codes_B, dtype=np.int64)
        width = max(int(self.tokens[depth].max()), int(codes_B.max(initial=0))) + 1
        keys = self.parents[depth] * width + self.tokens[depth]  # ascending, since children are in order of (parent, code)
        wanted_B = np.where((nodes_B < 0) | (codes_B < 0), -1, nodes_B * width + codes_B)
        found_B = np.minimum(np.searchsorted(keys, wanted_B), len(keys) - 1)
        return np.where(keys[found_B] == wanted_B, found_B, -1)

    def lookup(self, codes_BL: NDArray[np.integer]) -> Ints:
        """(B,) item row of each full ID; -1 for an ID that no item has."""
        codes_BL = np.asarray(codes_BL)
        nodes_B = np.zeros(len(codes_BL), dtype=np.int64)
        for depth in range(self.levels):
            nodes_B = self.child(depth, nodes_B, codes_BL[:, depth])
        return np.where(nodes_B < 0, -1, self.items[np.maximum(nodes_B, 0)])
