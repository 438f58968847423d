"""Follow provenance through each torch operation; used by the recorder only.

An operation that only looks (a view) needs nothing, since provenance goes by storage. One that copies elements as they
are writes a log entry that points back, or is carried out by others that do (`REWRITES`). Any other taints its result
with its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from bridge.model.regions import Region
from bridge.tracing.provenance import (
    NOT_SENT,
    LoggedWrite,
    ResolvedWrites,
    entry_for,
    region_of,
    resolve,
    storage_key,
    tensors_in,
    window,
)

if TYPE_CHECKING:
    from bridge.tracing.recorder import Recorder

aten: Any = torch.ops.aten

Handler = Callable[["Recorder", Any, tuple[Any, ...], Mapping[str, Any]], Any]


@cache
def default_handler(func: Any) -> Handler:
    """Classify an operation by its schema, once: a view, a write in place, or something that makes new values."""
    returns = [r.alias_info for r in func._schema.returns]
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
        return _arithmetic_in_place
    if returns and all(info is not None for info in returns):
        return _plain
    return _arithmetic


def _plain(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


def _arithmetic(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    result = func(*args, **kwargs)
    if any(rec.derived(t) for t in tensors_in((args, kwargs))):
        before = {storage_key(t) for t in tensors_in((args, kwargs))}
        for out in tensors_in(result):
            if storage_key(out) not in before:
                held = region_of(out)
                rec.write(out, [(LoggedWrite(held, taint=f"computed by {func}"), held, held)])
    return result


def _arithmetic_in_place(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    result = func(*args, **kwargs)
    involved = any(rec.derived(t) for t in tensors_in((args, kwargs)))
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        for out in tensors_in(args[k] if k < len(args) else kwargs.get(argument.name)):
            held = region_of(out)
            if involved or storage_key(out) in rec.storages:
                rec.write(out, [(LoggedWrite(held, taint=f"computed in place by {func}"), held, held)])
    return result


def _copy(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    dest, src = args[0], args[1]
    _store(rec, dest, src, lambda: func(*args, **kwargs))
    return dest


def _store(rec: Recorder, dest: torch.Tensor, src: torch.Tensor, run: Callable[[], Any]) -> None:
    """Log `dest[...] = src`, broadcasting. `run` is the operation itself, called only for its refusal."""
    if dest.shape != src.shape:
        try:
            src = src.expand(dest.shape)
        except RuntimeError:
            run()
            raise
    held = region_of(dest)
    if rec.knows(src):
        if src.dtype != dest.dtype or _same_view_of_bits(rec, dest, src):
            rec.write(dest, rec.read(src, held))
        else:
            _bits(rec, dest, src, held)
    elif storage_key(dest) in rec.storages:
        rec.write(dest, _foreign(src, held))


def _same_view_of_bits(rec: Recorder, dest: torch.Tensor, src: torch.Tensor) -> bool:
    """False when both sides are viewed through another dtype than their own: bits are copied, not values."""
    a, b = rec.storages.get(storage_key(dest)), rec.storages.get(storage_key(src))
    return a is None or b is None or a.dtype == dest.dtype or b.dtype == src.dtype


def _bits(rec: Recorder, dest: torch.Tensor, src: torch.Tensor, held: Region) -> None:
    """A copy of bit patterns: followed when both storages have the same dtype and the views the same item size."""
    into, out_of = rec.track(dest), rec.track(src)
    if into.dtype == out_of.dtype and into.dtype.itemsize == dest.dtype.itemsize:
        found = resolve(out_of.log, region_of(src), held)
    else:
        found = [(LoggedWrite(held, taint=f"reinterprets {out_of.dtype} as {into.dtype}"), held, held)]
    for write, origin, at in found:
        entry = entry_for(write, origin, at, into.dtype)
        into.log.append(entry)
        if into.targets:
            rec.emit(into, entry)


def _foreign(src: torch.Tensor, held: Region) -> ResolvedWrites:
    """Log a value that was not sent: a constant when it is a single known number, else a taint."""
    if src.device.type != "meta" and src.untyped_storage().nbytes() == src.element_size():
        return [(LoggedWrite(held, value=src.reshape(-1)[:1].item()), held, held)] if held.numel else []
    return [(LoggedWrite(held, taint=NOT_SENT), held, held)] if held.numel else []


def _foreach_copy(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    for dest, src in zip(args[0], args[1], strict=True):
        _store(rec, dest, src, lambda: func(*args, **kwargs))
    return None


def _fill(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    dest, value = args[0], args[1] if len(args) > 1 else 0.0
    if isinstance(value, torch.Tensor):
        _store(rec, dest, value, lambda: func(*args, **kwargs))
    elif not isinstance(value, complex):
        held = region_of(dest)
        rec.write(dest, [(LoggedWrite(held, value=float(value)), held, held)] if held.numel else [])
    return func(*args, **kwargs)


def _constant(value_of: Callable[[tuple[Any, ...]], Any]) -> Handler:
    def handler(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        result = func(*args, **kwargs)
        value = value_of(args)
        if isinstance(value, (int, float)) and result.numel():
            held = region_of(result)
            rec.write(result, [(LoggedWrite(held, value=float(value)), held, held)])
        return result

    return handler


def _identity(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Log a result that has the elements of the first argument, in a storage of its own."""
    result = func(*args, **kwargs)
    if rec.knows(args[0]):
        rec.write(result, rec.read(args[0], region_of(result)))
    return result


def _to_copy(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if rec.knows(args[0]) and args[0].device.type == "meta":
        # A loader may send a stand-in to a real device; there is nothing to send, so it stays where it is.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    return _identity(rec, func, args, kwargs)


def _cat(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    tensors: Sequence[torch.Tensor] = args[0]
    result = func(*args, **kwargs)
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(result.dim(), 1)
    # torch lets an empty 1-D tensor take part in any concatenation.
    parts = [t for t in tensors if tuple(t.shape) != (0,) or result.dim() == 1]
    at = 0
    for part in parts if any(map(rec.knows, parts)) else ():
        held = window(region_of(result), axis, at, part.shape[axis])
        rec.write(result, rec.read(part, held) if rec.knows(part) else _foreign(part, held))
        at += part.shape[axis]
    return result


def _index_select(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return _gather(rec, func, args, kwargs, args[1], args[2])


def _index(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    used = [(axis, index) for axis, index in enumerate(args[1]) if index is not None]
    known = len(used) == 1 and used[0][1].dim() == 1 and used[0][1].dtype != torch.bool
    return _gather(rec, func, args, kwargs, *used[0]) if known else _arithmetic(rec, func, args, kwargs)


def _gather(
    rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], axis: int, index: torch.Tensor
) -> Any:
    """Log rows picked by a list whose values are known (a loader's constant): each run of steady steps is one slice."""
    source: torch.Tensor = args[0]
    if index.device.type == "meta" or not rec.knows(source) or source.dim() == 0:
        return _arithmetic(rec, func, args, kwargs)
    rows = [k % source.shape[axis] for k in index.reshape(-1).tolist()]
    at, axis, view, pieces = 0, axis % source.dim(), region_of(source), [source.narrow(axis, 0, 0)]
    while at < len(rows):
        step = rows[at + 1] - rows[at] if at + 1 < len(rows) and rows[at + 1] >= rows[at] else 1
        end = at + 1
        while end < len(rows) and rows[end] - rows[end - 1] == step:
            end += 1
        strides = (*view.strides[:axis], view.strides[axis] * step, *view.strides[axis + 1 :])
        shape = (*view.shape[:axis], end - at, *view.shape[axis + 1 :])
        pieces.append(source.as_strided(shape, strides, view.offset + rows[at] * view.strides[axis]))
        at = end
    with rec.mode:
        return torch.cat(pieces, axis)


# ---- operations that are carried out by others, which are recorded --------------------------------------------------


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _pad(source: torch.Tensor, pad: Sequence[int], value: float = 0) -> torch.Tensor:
    shape, inner, taken = list(source.shape), [slice(None)] * source.dim(), [slice(None)] * source.dim()
    for k, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis, size = source.dim() - 1 - k, source.shape[source.dim() - 1 - k]
        shape[axis] = before + size + after
        inner[axis] = slice(max(before, 0), shape[axis] - max(after, 0))
        taken[axis] = slice(max(-before, 0), size - max(-after, 0))
    padded = torch.full(shape, value, dtype=source.dtype, device=source.device)
    padded[tuple(inner)].copy_(source[tuple(taken)])
    return padded


def _repeat(source: torch.Tensor, repeats: Sequence[int]) -> torch.Tensor:
    shape = [*[1] * (len(repeats) - source.dim()), *source.shape]
    blocks = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    spread = source.reshape([n for size in shape for n in (1, size)]).expand(blocks)
    whole = [count * size for count, size in zip(repeats, shape, strict=True)]
    return spread.clone(memory_format=torch.contiguous_format).view(whole)


def _slice_scatter(base: torch.Tensor, src: torch.Tensor, *where: Any, **kwargs: Any) -> torch.Tensor:
    result = base.clone()
    aten.slice.Tensor(result, *where, **kwargs).copy_(src)
    return result


def _select_scatter(base: torch.Tensor, src: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    result = base.clone()
    result.select(dim, index).copy_(src)
    return result


REWRITES: Mapping[Any, Callable[..., torch.Tensor]] = {
    aten.stack.default: _stack,
    aten.constant_pad_nd.default: _pad,
    aten.repeat.default: _repeat,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
}
"""Operation -> the same in terms of operations that the recorder follows."""
HANDLERS: dict[Any, Handler] = {
    aten.copy_.default: _copy,
    aten._foreach_copy_.default: _foreach_copy,
    aten.clone.default: _identity,
    aten._to_copy.default: _to_copy,
    aten.cat.default: _cat,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.zero_.default: _fill,
    aten.set_.source_Tensor: _plain,
    aten.set_.source_Storage_storage_offset: _plain,
    **{op.default: _plain for op in (aten.empty_like, aten.new_empty, aten.new_empty_strided)},
    **{op.default: _constant(lambda args: 0.0) for op in (aten.zeros, aten.zeros_like, aten.new_zeros)},
    **{op.default: _constant(lambda args: 1.0) for op in (aten.ones, aten.ones_like, aten.new_ones)},
    **{op.default: _constant(lambda args: args[1]) for op in (aten.full, aten.full_like)},
    aten.new_full.default: _constant(lambda args: args[2]),
    aten.scalar_tensor.default: _constant(lambda args: args[0]),
}
"""Operation -> its handler. Every other operation is a view, or taints its result."""
