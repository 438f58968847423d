"""Call one module on a few rows and compare its output with that of the weights it should hold.

Trying on a twin with known weights shows which inputs a module takes (rows or ids), and which reference describes it (a
matrix product, a table look-up, or only a twin of the module).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from bridge.model.same_bits import same_bits
from engine_side.live import storage_layout
from engine_side.plan.experiment_errors import is_out_of_memory
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.protocol import RankHost

ROWS = 8
MAX_ROWS = 256
MAX_IDS = 64
_PART = 256 << 10
"""Elements of a weight that are widened at once: few enough to stay in a core's cache."""
_SUMMED = 1024
"""Subnormal terms that one output of a module may have lost."""
PERIOD = 1_000_003
"""Elements after which test values repeat. A prime, so that no rearrangement of rows, columns or tiles maps them onto
themselves."""


@dataclass(frozen=True)
class Probe:
    """One way to call a module, with the output to expect.

    Attributes:
        kind: "rows" of `size` features in `dtype`, or "ids" from `start` on, `size` of them.
        count: rows in the batch.
        form: "linear" (x W^T + b), "turned" (x W + b), "rows" (W[ids]) or "twin" (a twin's own output).
        weight, bias: names of canonical parameters.
    """

    kind: str
    size: int
    count: int
    dtype: torch.dtype
    start: int = 0
    form: str = "twin"
    weight: str = ""
    bias: str = ""

    def inputs(self, device: torch.device, seed: int = 0) -> torch.Tensor:
        """Make [count, size] rows, the last one zero so that a bias shows alone; or [n] ids, both ends included."""
        if self.kind == "ids":
            n = min(self.size, MAX_IDS)
            steps = torch.linspace(0, self.size - 1, n, dtype=torch.float64).round().to(torch.int64)
            return (steps + self.start).to(device)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.count, self.size, generator=generator)
        rows[-1] = 0
        return rows.to(device=device, dtype=self.dtype)

    def reference(
        self, x: torch.Tensor, values: Mapping[str, torch.Tensor], blocks: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute (output, tolerance per element) from canonical weights. Not for "twin".

        A wrong row of the weight, or a missing bias, is many tolerances away: rounding grows with the root of the
        reduction length, such an error with the size of the output itself.

        Args:
            blocks: the weight in blocks of rows, one below the other; taken from `values` when empty.
        """
        if self.form == "rows":
            found = values[self.weight][x - self.start].double()
            return found, torch.zeros_like(found)
        if not blocks:
            blocks = (values[self.weight] if self.form == "linear" else values[self.weight].t(),)
        dtype, device = blocks[0].dtype, blocks[0].device
        wide = torch.float64 if dtype.itemsize >= 4 else torch.float32
        rows = x.to(wide)
        lengths = rows.norm(dim=1) / math.sqrt(max(rows.shape[1], 1))
        if x.dtype is dtype and _multiplies(dtype, device):
            out, norms = _native_product(x, blocks, lengths)
        else:
            out, norms = _wide_product(rows, blocks)
        spread = torch.outer(lengths, norms)
        if self.bias:
            bias = values[self.bias].to(wide)
            out, spread = out + bias, spread + bias.abs()
        limit = out.abs().add_(spread)
        narrow, accumulate = _eps(dtype, device), _eps(torch.float32, device)
        limit *= 4 * narrow + 2 * math.sqrt(rows.shape[1]) * min(accumulate, narrow)
        # A kernel may take any subnormal for zero: an input, a weight, a product, the bias, the result.
        flushed = _tiny(dtype) * (rows.abs().sum(dim=1, keepdim=True) + rows.shape[1] + 2)
        return out, limit.add_(flushed)


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """True when this processor multiplies matrices of `dtype` as they are and accumulates in fp32.

    Then a product is as exact as an output of `dtype` can be, at the price of reading the weights once. A GPU may
    accumulate in less.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype is torch.bfloat16 and device.type == "cpu" and supported is not None and bool(supported())


def _native_product(
    x: torch.Tensor, blocks: Sequence[torch.Tensor], lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (x W^T, norm of each row of W) in the dtype of `lengths`, the root mean square of each row of x.

    The norms are estimated from the outputs: outputs of random rows spread as the norms do, and a tolerance needs no
    more.
    """
    parts = [x @ block.t() for block in blocks]
    out = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(lengths.dtype)
    shown = (lengths > 0).to(lengths.dtype)
    # The mean size of a normal variable is sqrt(2 / pi) of its spread.
    per_row = shown * math.sqrt(math.pi / 2) / lengths.clamp_min(_tiny(lengths.dtype)) / shown.sum().clamp_min(1)
    return out, torch.mv(out.abs().t(), per_row)


def _wide_product(rows: torch.Tensor, blocks: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (x W^T, norm of each row of W) in the dtype of `rows`, a cacheful of W at a time through one buffer."""
    out, norms = list[torch.Tensor](), list[torch.Tensor]()
    for weight in blocks:
        count, size = weight.shape
        step = max(1, _PART // max(size, 1))
        buffer = torch.empty(min(step, count), size, dtype=rows.dtype, device=weight.device)
        for start in range(0, max(count, 1), step):
            part = weight[start : start + step]
            block = buffer[: len(part)].copy_(part)
            out.append(rows @ block.t())
            norms.append(torch.linalg.vector_norm(block, dim=1))
    return torch.cat(out, dim=1), torch.cat(norms)


def twin_tolerance(reference: torch.Tensor) -> torch.Tensor:
    """Compute the tolerance per element between two runs of the same code on the same values.

    They may differ by the order of rounding and by the treatment of subnormals. Values that are not finite do not
    widen the tolerance of the others.
    """
    reference = _real(reference)
    wide = reference.double().nan_to_num(0.0, 0.0, 0.0)
    rounding = 4 * _eps(reference.dtype, reference.device) * (wide.abs() + wide.square().mean().sqrt())
    return rounding + _SUMMED * _tiny(reference.dtype)


def call_module(host: RankHost, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Call a module on `x`; None where it cannot be called so. Raises what the engine raises when memory runs out."""
    try:
        with torch.no_grad():
            y = host.apply(module, x)
    except LOADER_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return None
    return y.detach().clone() if isinstance(y, torch.Tensor) and y.numel() else None


def find_probes(
    host: RankHost,
    module: nn.Module,
    values: Mapping[str, torch.Tensor],
    first_row: Mapping[str, tuple[int, int]],
    computes_in: torch.dtype = torch.float32,
) -> tuple[Probe, ...]:
    """Find the ways to call `module`: by ids, by rows, or both; empty when it accepts neither.

    A table that is also a head takes both, and may keep one copy of its weight for each.

    Args:
        values: the canonical values that the module holds, by name.
        first_row: name -> (first global row, number of sent rows) on this rank.
        computes_in: dtype of rows where a weight is stored as codes. A kernel of the engine may trust it to be that in
            which the engine computes, and write past the end of rows of a smaller one.
    """
    found: dict[str, Probe] = {}
    for probe in _candidates(values, first_row, computes_in):
        if probe.kind in found:
            continue
        x = probe.inputs(next(iter(values.values())).device)
        y = call_module(host, module, x)
        if y is not None:
            found[probe.kind] = _with_form(probe, x, y, values)
    return tuple(found.values())


def _candidates(
    values: Mapping[str, torch.Tensor], first_row: Mapping[str, tuple[int, int]], computes_in: torch.dtype
) -> list[Probe]:
    # the largest parameter says most about the inputs: a matrix before its bias and its scales
    ordered = sorted(values.items(), key=lambda item: -item[1].numel())
    count = ROWS
    for _, value in ordered:
        if value.dim() > 2:
            count = max(count, min(2 * value.shape[0] + 1, MAX_ROWS))
    out: list[Probe] = []
    for name, value in ordered:
        if value.dim() == 2:
            start, rows = first_row.get(name, (0, value.shape[0]))
            out.append(Probe("ids", rows, count, torch.int64, start))
    for _, value in ordered:
        floating = value.dtype if value.is_floating_point() and value.element_size() > 1 else computes_in
        for size in dict.fromkeys(reversed(value.shape)):
            out.extend(Probe("rows", size, count, dtype) for dtype in dict.fromkeys((floating, torch.float32)))
    return out


def _with_form(probe: Probe, x: torch.Tensor, y: torch.Tensor, values: Mapping[str, torch.Tensor]) -> Probe:
    """Give a probe the simplest reference that describes the module's output `y` on `x`."""
    matrices = [name for name, value in values.items() if value.dim() == 2 and value.is_floating_point()]
    vectors = [name for name, value in values.items() if value.dim() == 1 and value.is_floating_point()]
    forms = ("rows",) if probe.kind == "ids" else ("linear", "turned")
    for weight in matrices:
        for form in forms:
            for bias in ("",) if form == "rows" else ("", *vectors):
                tried = replace(probe, form=form, weight=weight, bias=bias)
                if mismatch(tried, x, y, values) is None:
                    return tried
    return probe


def mismatch(probe: Probe, x: torch.Tensor, y: torch.Tensor, values: Mapping[str, torch.Tensor]) -> str | None:
    """Say how far `y` is off the output that `values` give; None when it is within tolerance."""
    try:
        want, limit = probe.reference(x, values)
    except (RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return str(error)
    return deviation(y, want, limit)


def deviation(y: torch.Tensor, want: torch.Tensor, limit: torch.Tensor) -> str | None:
    """Say where |y - want| exceeds the limit most; None when it does so nowhere."""
    if y.shape != want.shape:
        return f"output of shape {tuple(y.shape)} instead of {tuple(want.shape)}"
    if y.is_complex() != want.is_complex():
        return f"output in {y.dtype} instead of {want.dtype}"
    y, want = _real(y), _real(want)
    exact = torch.float32 if max(y.itemsize, want.itemsize // 2) <= 2 else torch.float64
    have, wide = y.to(exact), want.to(exact)
    off = (have - wide).abs_()
    if not off.numel() or (math.isfinite(float(off.amax())) and bool((off <= limit).all())):
        return None
    # Which of NaN and infinity comes of a sum depends on its order; that neither becomes a number does not.
    bad = torch.where(wide.isfinite(), ~(off <= limit), have.isfinite())
    # Below or above what an output can hold, its rounding is more than any tolerance; the reference rounds there too.
    bad &= have != want.to(y.dtype).to(exact)
    if not bool(bad.any()):
        return None
    worst = int(torch.where(bad, torch.nan_to_num(off, nan=torch.inf), -1.0).argmax())
    at = tuple(int(k) for k in np.unravel_index(worst, tuple(off.shape)))  # torch's own imports sympy, half a second
    got, expected = float(have[at]), float(wide[at])
    return f"{int(bad.sum())} of {y.numel()} outputs off, at {at} {got:.6g} instead of {expected:.6g}"


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """View a complex tensor as pairs of numbers."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def state_deviation(have: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> str | None:
    """Say which tensor differs from the one that the same code made of the same values; None when none does."""
    for name, made in want.items():
        held = have.get(name)
        if held is None:
            return f"{name} is missing"
        why = deviation(held, made, twin_tolerance(made))
        if why is not None:
            return f"{name}: {why}"
    return None


def random_values(shapes: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Make values of about unit variance, different for each seed, by which experiments tell versions apart."""
    out = [torch.empty_like(like) for like in shapes]
    randomise(out, seed)
    return out


def randomise(values: Sequence[torch.Tensor], seed: int) -> None:
    """Fill dense tensors with the values of `random_values`."""
    for k, value in enumerate(values):
        tile_into(value, random_tile(value, (seed, k)))


def random_tile(like: torch.Tensor, seed: tuple[int, ...]) -> torch.Tensor:
    """Make flat values of about unit variance for `tile_into`, from one random byte per element."""
    generator, numel = np.random.default_rng(seed), min(like.numel(), PERIOD)
    if not like.is_floating_point():
        high = 2 if like.dtype is torch.bool else 100
        return torch.from_numpy(generator.integers(0, high, numel, dtype=np.uint8)).to(like.device, like.dtype)
    noise = torch.from_numpy(generator.integers(-128, 128, numel, dtype=np.int8)).to(like.device)
    wide = noise.to(torch.bfloat16 if like.element_size() <= 2 else like.dtype).mul_(1 / 74)
    return wide.to(like.dtype)


def tile_into(tensor: torch.Tensor, tile: torch.Tensor) -> None:
    """Fill a dense tensor, in the order of its memory, with repetitions of `tile`."""
    flat = storage_layout.flat(tensor)
    for start in range(0, len(flat), max(len(tile), 1)):
        part = flat[start : start + len(tile)]
        part.copy_(tile[: len(part)])


def is_tiled(tensor: torch.Tensor, tile: torch.Tensor) -> bool:
    """True when a dense tensor of the tile's dtype holds, bit for bit, the values that `tile_into` writes."""
    flat = storage_layout.flat(tensor)
    return all(
        same_bits(part, tile[: len(part)])
        for part in (flat[start : start + len(tile)] for start in range(0, len(flat), max(len(tile), 1)))
    )


def _eps(dtype: torch.dtype, device: torch.device) -> float:
    if dtype is torch.float32 and device.type == "cuda":
        return 2.0**-11  # matrix units may round inputs of fp32 products to tf32
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _tiny(dtype: torch.dtype) -> float:
    """The magnitude below which kernels may flush a value to zero; narrower exponents are widened before computing."""
    return min(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny) if dtype.is_floating_point else 0.0
