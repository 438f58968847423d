"""Paged key-value memory: the tensors, and the pool of blocks with its prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
import xxhash


class KVTensors:
    """Keys and values of every layer: [blocks, block_size, kv heads, head dim], zeros at the start."""

    def __init__(
        self, layers: int, blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        shape = (2, layers, blocks, block_size, heads, head_dim)
        # numpy's zeros are not touched until used (calloc), so a large pool costs nothing at the start; they must be
        # zeros, for what a mask hides is still multiplied.
        flat = np.zeros(2 * layers * blocks * block_size * heads * head_dim * dtype.itemsize, dtype=np.uint8)
        self._data = torch.from_numpy(flat).view(dtype).view(shape)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer."""
        return self._data[0, index], self._data[1, index]


def block_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: its tokens and all tokens before it."""
    return xxhash.xxh3_128_digest(before + np.asarray(tokens, dtype=np.int64).tobytes())


class BlockPool:
    """Which blocks are free, who shares one, and which hold the keys and values of a known prefix.

    A released block keeps its contents and its hash until it is needed again, oldest first. The hash names tokens, not
    weights: after a weight change only `reset` makes the pool right again.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(blocks))
        self._users = [0] * blocks
        self._hash_of: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}
        self.hits = 0

    @property
    def free(self) -> int:
        """Blocks that nobody uses (they may still be cached)."""
        return len(self._free)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Blocks that hold the longest known prefix of `tokens`, at least one token short of it. Takes no share."""
        found: list[int] = []
        name = b""
        for end in range(self.block_size, len(tokens), self.block_size):
            name = block_hash(name, tokens[end - self.block_size : end])
            block = self._by_hash.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Take a share in cached blocks."""
        for block in blocks:
            self._free.pop(block, None)
            self._users[block] += 1
        self.hits += len(blocks)

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these blocks are among the free ones."""
        return sum(block in self._free for block in blocks)

    def take(self) -> int:
        """A fresh block. The caller has checked `free`."""
        block, _ = self._free.popitem(last=False)
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._by_hash[name]
        self._users[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back; the last of a chain is reused first, for the others are useless without the first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None

    def remember(self, block: int, name: bytes) -> None:
        """A full block was computed. The first block of a name stays the known one."""
        if name not in self._by_hash and block not in self._hash_of:
            self._by_hash[name] = block
            self._hash_of[block] = name

    def reset(self) -> bool:
        """Forget every prefix; False, and nothing forgotten, while a block is in use."""
        if any(self._users):
            return False
        self._hash_of.clear()
        self._by_hash.clear()
        return True
