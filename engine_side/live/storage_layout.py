"""Find out from the outside how a post-load step rearranged a tensor.

A tensor is filled with the digits of each element's own index (small integers that its dtype holds exactly), the
engine's step is run, and what lies where is read back. An affine permutation (transposes, tiles, any nest of strides)
is derived from a handful of positions and then proven on every element; it is kept as two regions, never as indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from bridge.errors import REPORT, ConfigError
from bridge.model.regions import Region, follow
from bridge.model.same_bits import same_bits

PROBE_RANGE = 256
"""Digits are below this: bf16 and fp16 hold these integers exactly, smaller types fewer (`exact_base`)."""


@dataclass(frozen=True)
class Stored:
    """The layout of one canonical tensor in its module after post-load.

    Attributes:
        shape, strides, dtype: of the live tensor.
        held: the canonical elements as a region, digit by digit.
        origin: the same digits in the live storage. Both regions count from the tensor's first element, and both are
            None where the values are no longer in the tensor.
        why: the reason, where they are not.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    held: Region | None
    origin: Region | None
    why: str = ""

    @property
    def readable(self) -> bool:
        return self.held is not None

    @property
    def identity(self) -> bool:
        return self.held is not None and self.held == self.origin

    def side_by_side(self, live: torch.Tensor, canonical: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """View the same elements of the live tensor and of a whole canonical one, in the same order.

        Raises ConfigError when the live tensor does not hold the canonical values.
        """
        if self.held is None or self.origin is None:
            raise ConfigError(
                "this tensor does not hold its canonical values",
                where="a live tensor",
                expected="canonical values",
                got=self.why,
                remedy=REPORT,
            )
        a, b = flat(live), flat(canonical)
        return (
            a.as_strided(self.origin.shape, self.origin.strides, a.storage_offset() + self.origin.offset),
            b.as_strided(self.held.shape, self.held.strides, b.storage_offset() + self.held.offset),
        )

    def locate(self, dest: Region, source: Region) -> list[tuple[Region, Region]] | None:
        """Turn a move to canonical `dest` into (live region, source region) pairs; None where it cannot be followed."""
        if self.held is None or self.origin is None:
            return None
        if self.identity:
            return [(dest, source)]
        found = follow(dest, source, self.held, self.origin)
        return None if found is None or found.outside else list(found.inside)


def exact_base(dtype: torch.dtype) -> int:
    """Count the consecutive integers from 0 that a dtype tells apart, at most PROBE_RANGE."""
    wide = torch.arange(PROBE_RANGE, dtype=torch.int32)
    same = wide.to(dtype).to(torch.int32) == wide
    return PROBE_RANGE if bool(same.all()) else int((~same).to(torch.int8).argmax())


def digits_needed(numel: int, base: int) -> int:
    """Count the passes that tell `numel` indices apart."""
    passes, reach = 1, base
    while reach < numel:
        passes, reach = passes + 1, reach * base
    return passes


def code(numel: int, base: int, digit: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make a tensor [numel] with digit number `digit` of each index, in `base`."""
    span = base**digit
    blocks = torch.arange(min(base, -(-numel // span)), dtype=torch.uint8, device=device)
    period = blocks.repeat_interleave(min(span, numel))
    return period.repeat(-(-numel // len(period)))[:numel].to(dtype)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """View the elements of a dense tensor in the order in which they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


ViewKey = tuple[int, int, int, torch.dtype]


def whole_view_key(tensor: torch.Tensor) -> ViewKey:
    """Make a key that dense views of the same memory share, whatever their shapes: storage, offset, elements, dtype."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel(), tensor.dtype


def is_dense(tensor: torch.Tensor) -> bool:
    """True when the elements fill a stretch of memory without gaps or overlaps."""
    return _is_gapless((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def _is_gapless(dims: Iterable[tuple[int, int]]) -> bool:
    """True when dimensions, as (stride, size), reach every element of one stretch once."""
    reach = 1
    for stride, size in sorted(dims):
        if stride != reach:
            return False
        reach *= size
    return True


def affine(shown: Sequence[torch.Tensor], base: int) -> tuple[Region, Region] | None:
    """Find (canonical digits, live digits) of the permutation that made `code(.., digit k)` into `shown[k]`.

    None when it is not a nest of strides. Proven on every element.
    """
    numel = shown[0].numel()

    def decode(position: int) -> int:
        digits = [seen[position].item() for seen in shown]
        if not all(map(math.isfinite, digits)):
            return -1  # a step that computes with the values made it: no place of any element
        return sum(int(digit) * base**k for k, digit in enumerate(digits))

    levels = _levels(decode, numel)
    if levels is None or not _is_gapless((step, size) for size, step, _ in levels):
        return None
    shape = tuple(size for size, _, _ in reversed(levels))
    canonical = Region(0, shape, tuple(step for _, step, _ in reversed(levels)))
    live = Region(0, shape, tuple(at for _, _, at in reversed(levels)))
    for k, seen in enumerate(shown):
        want = code(numel, base, k, seen.dtype, seen.device).as_strided(shape, canonical.strides).reshape(-1)
        if not same_bits(want, seen):
            return None
    return canonical, live


def _levels(decode: Callable[[int], int], numel: int) -> list[tuple[int, int, int]] | None:
    """Read (size, canonical stride, live stride) off the positions where a level ends, innermost live stride first."""
    if decode(0) != 0:
        return None
    levels: list[tuple[int, int, int]] = []
    inner = 1
    while inner < numel:
        step, rest = decode(inner), numel // inner
        if numel % inner or step <= 0:
            return None
        size = next((d for d in _divisors(rest) if d == rest or decode(inner * d) != d * step), rest)
        levels.append((size, step, inner))
        inner *= size
    return levels


def _divisors(n: int) -> list[int]:
    """List the divisors of n above 1, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({d for pair in ((d, n // d) for d in small) for d in pair if d > 1})
