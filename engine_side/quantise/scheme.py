"""The arithmetic of a weight's quantisation: one scale per tensor, channel, group or block, codes in fp8 or int8.

A scheme is symmetric and depends on the weight alone: the scale of a block is its largest value divided by `peak`, and
each code is its value divided by the scale, rounded. Pure torch; nothing here knows an engine or a name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_STRIPE = 1 << 22
"""Elements that are widened at once."""
_TIE = 2.0**-27
"""Part of a value that decides between two codes and that no scale of 24 bits shows."""
_SLACK = 1e-3
"""Part of a rounding step by which the arithmetic of a quantiser may add to its rounding."""


@dataclass(frozen=True)
class Scheme:
    """One way to make codes and scales of a matrix.

    Attributes:
        codes, scales: dtypes of both.
        block: rows and columns under one scale; the last block of a row or column may be smaller.
        scale_shape: shape of the tensor of scales in the checkpoint, one element per block in the order of the blocks.
        peak: multiple of the scale to which the largest value of a block corresponds.
        powers_of_two: scales are rounded up to powers of two.
    """

    codes: torch.dtype
    scales: torch.dtype
    block: tuple[int, int]
    scale_shape: tuple[int, ...]
    peak: float
    powers_of_two: bool = False

    def quantise(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make (codes, scales) of a matrix. Blocks for two passes over it."""
        grid = self.grid(values)
        largest = torch.empty(grid, dtype=_wide(values), device=values.device)
        for at, tiles in self._stripes(values):
            largest[at : at + len(tiles)] = tiles.abs().amax(dim=(1, 3))
        scales = self._scales(largest)
        codes = torch.empty(values.shape, dtype=self.codes, device=values.device)
        for at, tiles in self._stripes(values):
            spread = scales[at : at + len(tiles), None, :, None].to(tiles.dtype)
            made = self._round(tiles / spread).reshape(len(tiles) * self.block[0], -1)
            into = codes[at * self.block[0] : (at + len(tiles)) * self.block[0]]
            into.copy_(made[: len(into), : into.shape[1]])
        return codes, scales.reshape(self.scale_shape)

    def dequantise(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Compute the values that codes and scales stand for, exactly."""
        out = torch.empty(codes.shape, dtype=torch.float64, device=codes.device)
        grid = scales.reshape(self.grid(codes)).double()
        for at, rows in self._rows(codes):
            out[at : at + len(rows)] = rows.double() * self._spread(grid, at, rows)
        return out

    def compare(self, values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> tuple[float, float]:
        """Compare codes and scales with the values that they were made of. Blocks for a pass.

        Returns (relative error of the matrix by the Frobenius norm, largest error of an element as a multiple of half
        a step between neighbouring codes). Of correct codes, the second is at most 1 by more than the slack of the
        arithmetic.
        """
        grid = scales.reshape(self.grid(codes)).double()
        off = total = worst = 0.0
        for at, rows in self._rows(codes):
            spread = self._spread(grid, at, rows)
            want, have = values[at : at + len(rows)].double(), rows.double()
            error = (want - have * spread).abs_()
            off, total = off + float(error.square().sum()), total + float(want.square().sum())
            steps = error / (spread * self._reach(have))
            worst = max(worst, float(steps.nan_to_num(math.inf, math.inf).max())) if steps.numel() else worst
        return math.sqrt(off / total) if total else math.sqrt(off), worst

    def within(self, worst: float) -> bool:
        """Tell if a largest error, as `compare` returns it, is one of rounding alone."""
        return worst <= 1 + _SLACK

    def explains(self, codes: torch.Tensor, scales: torch.Tensor) -> bool:
        """Tell if there is a matrix of which this scheme makes exactly these codes and scales.

        Such a matrix can be written down: the dequantised one, with the largest value of each block put back to what
        its scale was made of, a little more or less where it lay between two codes. Any scale explains a block of
        zeros.
        """
        if codes.dtype != self.codes or scales.dtype != self.scales or tuple(scales.shape) != self.scale_shape:
            return False
        grid = scales.reshape(self.grid(codes))
        matrix = self.dequantise(codes, scales)
        used = torch.empty(grid.shape, dtype=torch.bool, device=codes.device)
        for at, tiles in self._stripes(codes.double()):
            high, low = tiles.amax(dim=(1, 3)), tiles.amin(dim=(1, 3))
            top = torch.where(-low > high, low, high)
            used[at : at + len(tiles)] = top != 0
            peaks = (tiles == top[:, None, :, None]) & (tiles != 0)
            whole = peaks.reshape(len(tiles) * self.block[0], -1)
            here = matrix[at * self.block[0] : (at + len(tiles)) * self.block[0]]
            spread = self._spread(grid.double(), at * self.block[0], here)
            peak = here.sign() * spread * self._before_rounding(here.abs() / spread)
            here.copy_(torch.where(whole[: len(here), : here.shape[1]], peak, here))
        made, found = self.quantise(matrix)
        same = found.reshape(grid.shape)[used] == grid[used]
        return bool(same.all()) and bool((made.double() == codes.double()).all())

    def grid(self, matrix: torch.Tensor) -> tuple[int, int]:
        """Count the blocks of a matrix: down, across."""
        return -(-matrix.shape[0] // self.block[0]), -(-matrix.shape[1] // self.block[1])

    def _scales(self, largest: torch.Tensor) -> torch.Tensor:
        scales = largest / self.peak
        if self.powers_of_two:
            mantissa, exponent = torch.frexp(scales)
            scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).to(exponent.dtype))
        scales = torch.where(largest > 0, scales, torch.ones_like(scales)).to(self.scales)
        return scales.where(scales != 0, torch.finfo(self.scales).tiny)

    def _round(self, quotients: torch.Tensor) -> torch.Tensor:
        if self.codes.is_floating_point:
            limit = torch.finfo(self.codes).max
            return quotients.clamp_(-limit, limit).to(self.codes)
        limits = torch.iinfo(self.codes)
        return quotients.round_().clamp_(limits.min, limits.max).to(self.codes)

    def _before_rounding(self, codes: torch.Tensor) -> torch.Tensor:
        """Compute, of its scale, the multiples that a block's largest value may have been, for its code's magnitude."""
        if self.powers_of_two:  # anything above half of the peak, which may have been rounded down to that
            return codes * (1 + (codes * 2 <= self.peak).double() * _TIE)
        return self.peak * (1 + (codes - self.peak).sign() * _TIE)

    def _reach(self, codes: torch.Tensor) -> torch.Tensor:
        """Compute how far from each code, in multiples of its scale, values lie to which it is the nearest. The
        outermost codes stand for what lies beyond them as well: where a scale was rounded down, the largest value of
        its block does."""
        form = torch.finfo(self.codes) if self.codes.is_floating_point else torch.iinfo(self.codes)
        beyond = self.peak * (1 + torch.finfo(self.scales).eps / 2) - codes.abs()
        half = self._half_step(codes)
        return torch.where((codes == form.max) | (codes == form.min), torch.maximum(half, beyond), half)

    def _half_step(self, codes: torch.Tensor) -> torch.Tensor:
        """Compute half of the distance to the neighbouring code."""
        if not self.codes.is_floating_point:
            return torch.full_like(codes, 0.5)
        form = torch.finfo(self.codes)
        exponent = torch.frexp(codes.abs().clamp_min(form.smallest_normal)).exponent - 1
        return torch.ldexp(torch.full_like(codes, form.eps / 2), exponent)

    def _spread(self, grid: torch.Tensor, start: int, rows: torch.Tensor) -> torch.Tensor:
        """The scale of every element of the rows of a matrix from `start` on."""
        lines = torch.arange(start, start + len(rows), device=rows.device) // self.block[0]
        return grid[lines].repeat_interleave(self.block[1], 1)[:, : rows.shape[1]]

    def _rows(self, matrix: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        step = max(1, _STRIPE // max(matrix.shape[1], 1))
        for start in range(0, len(matrix), step):
            yield start, matrix[start : start + step]

    def _stripes(self, matrix: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first block row, [block rows, rows, block columns, columns]) in a wide dtype, padded with zeros."""
        high, across = self.grid(matrix)
        rows, columns = self.block
        step = max(1, _STRIPE // (rows * columns * max(across, 1)))
        for at in range(0, high, step):
            part = matrix[at * rows : (at + step) * rows]
            count = -(-len(part) // rows)
            tiles = torch.zeros(count * rows, across * columns, dtype=_wide(matrix), device=matrix.device)
            tiles[: len(part), : part.shape[1]] = part
            yield at, tiles.view(count, rows, across, columns)


def _wide(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype is torch.float64 else torch.float32
