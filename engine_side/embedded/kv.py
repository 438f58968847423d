"""Paged key-value memory: the tensors, and the pool of blocks with its prefix cache."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash


class KVTensors:
    """The cache of every layer, zeros at the start.

    Args:
        shapes: layer -> (heads, width) of each of its tensors' entries for a token on this rank: keys and values; a
            latent attention keeps a single one.

        dtype: what they are stored in; where that is not computed in, values beyond its range become its largest.

    Attributes:
        layers: layer -> its tensors [blocks, block_size, heads, width].
    """

    def __init__(
        self, shapes: Mapping[int, Sequence[tuple[int, int]]], blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        self._largest = torch.finfo(dtype).max
        self.layers = {
            index: tuple(_zeros((blocks, block_size, *entry), dtype) for entry in entries)
            for index, entries in shapes.items()
        }

    def write(self, layer: int, slots: torch.Tensor, *entries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store entries [n, heads, width] of one layer at flat places [n]. Returns the layer's tensors."""
        tensors = self.layers[layer]
        for cache, entry in zip(tensors, entries, strict=True):
            if entry.dtype != cache.dtype:
                entry = entry.clamp(-self._largest, self._largest).to(cache.dtype)
            _words(cache).flatten(0, 1)[slots] = _words(entry)
        return tensors

    @staticmethod
    def read(cache: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Gather the entries of block tables [batch, k]: [batch, k, block_size, heads, width], to compute with."""
        return _words(cache)[blocks].view(cache.dtype).to(dtype)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """View one-byte floats as bytes: torch cannot index them."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # numpy's zeros are not touched until used (calloc), so a large pool costs nothing at the start; they must be
    # zeros, for what a mask hides is still multiplied.
    flat = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)


def block_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of a full block: of its tokens and, through `before`, of all tokens before it."""
    return xxhash.xxh3_128_digest(before + np.asarray(tokens, dtype=np.int64).tobytes())


def chain_start(lora: str | None) -> bytes:
    """Return the hash before a sequence's first block: keys and values of one LoRA serve no other."""
    return b"" if lora is None else xxhash.xxh3_128_digest(b"lora:" + lora.encode())


class BlockPool:
    """Counts the users of each KV block, and finds the blocks that hold a known prefix.

    A released block keeps its contents and its hash until it is needed again, oldest first. The hash names tokens, not
    weights: after a weight change only `reset` makes the pool right again. Each LoRA has prefixes of its own, by its
    name; a LoRA's name is never used twice, so prefixes of one that was dropped are never found again.
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
        """Number of blocks without a user (they may still be cached)."""
        return len(self._free)

    def match(self, tokens: Sequence[int], lora: str | None = None) -> list[int]:
        """Find the blocks of the longest prefix of `tokens` known under this LoRA, at least one token short of it.
        Takes no share."""
        found: list[int] = []
        name = chain_start(lora)
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
        """Count those of these blocks that are free."""
        return sum(block in self._free for block in blocks)

    def take(self) -> int:
        """Take a fresh block. The caller has checked `free`."""
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
        """Record the hash of a block that was computed. The first block of a hash stays the known one."""
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
