"""What of the things that a trainer calls tensors can be copied: plain, dense, with values in memory of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bridge.errors import ConfigError, DtypeMismatch, IntegrityError, MissingTensor

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_PLAIN = (torch.Tensor, nn.Parameter)


def require_plain(name: str, tensor: object) -> torch.Tensor:
    """The tensor itself, checked to have values that can be copied.

    A replicated DTensor becomes its local tensor, a subclass the plain tensor that shares its memory, and a view that
    is negated only when read (`is_neg()`) a tensor whose memory holds its values.

    Raises ConfigError (no tensor, sharded), IntegrityError (no values), DtypeMismatch (values that are not laid out as
    a strided tensor), naming it.
    """
    if not isinstance(tensor, torch.Tensor):
        raise not_pairs(name, type(tensor).__name__)
    require_initialised(name, tensor)
    given = type(tensor).__name__
    tensor = _local(name, tensor)
    if tensor.is_meta:
        raise IntegrityError(
            "a tensor on the meta device has no values to send",
            where=name,
            expected="a tensor with storage",
            got=f"device meta, shape {list(tensor.shape)}",
            remedy="materialise the model (load its weights) before the push",
            names=(name,),
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise DtypeMismatch(
            "only dense tensors travel",
            where=name,
            expected=str(torch.strided),
            got=f"{tensor.layout}, quantized {tensor.is_quantized}",
            remedy="send the dense values (tensor.to_dense(), tensor.dequantize())",
            names=(name,),
        )
    _require_memory(name, tensor, given)
    return _without_class(tensor).resolve_neg()


def require_initialised(name: str, tensor: torch.Tensor) -> None:
    """Raises IntegrityError for a lazy module's parameter or buffer, which has no shape before the first forward."""
    if is_lazy(tensor):
        raise IntegrityError(
            "a lazy module's tensor has neither shape nor values yet",
            where=name,
            expected="a tensor with storage",
            got=type(tensor).__name__,
            remedy="run one forward of the model, which initialises it, first",
            names=(name,),
        )


def addresses(sources: Sequence[torch.Tensor]) -> list[int] | None:
    """Where the first element of each lies, 0 where nothing does; None when some tensor cannot have an address."""
    try:
        return [t.data_ptr() for t in sources]
    except RuntimeError:
        return None


def read_pairs(named: NamedTensors) -> tuple[list[str], list[torch.Tensor]]:
    """Names and tensors of the iterable. Raises ConfigError for what is no iterable of pairs."""
    if isinstance(named, Mapping):
        named = named.items()
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    try:
        stream = iter(named)
    except TypeError as error:
        raise not_pairs("the argument of push", str(error)) from error
    # Two plain lists: thousands of kept tuples would set the garbage collector off in every push.
    for item in stream:
        try:
            name, tensor = item
        except (TypeError, ValueError) as error:
            raise not_pairs(f"item {len(names)}", f"{type(item).__name__}: {error}") from error
        names.append(name)
        tensors.append(tensor)
    return names, tensors


def nothing_sent() -> MissingTensor:
    return MissingTensor(
        "nothing was sent: the iterable is empty",
        where="the iterable given to push",
        expected="at least one (name, tensor) pair",
        got="none",
        remedy="a generator can be used only once: call model.named_parameters() again for each push",
    )


def not_pairs(where: str, got: str) -> ConfigError:
    return ConfigError(
        "push takes an iterable of (name, tensor) pairs",
        where=where,
        expected="pairs of str and torch.Tensor",
        got=got,
        remedy="push model.named_parameters()",
    )


def _without_class(tensor: torch.Tensor) -> torch.Tensor:
    """A subclass that only adds to a tensor, without what it adds: its own functions have no say in a copy."""
    if type(tensor) in _PLAIN:
        return tensor
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        return tensor.detach().as_subclass(torch.Tensor)


def _require_memory(name: str, tensor: torch.Tensor, given: str) -> None:
    """A wrapper around other tensors, or a tensor whose storage was freed, has elements but none of them in memory."""
    if not tensor.numel() or addresses([tensor]) not in (None, [0]):
        return
    freed = type(tensor) in _PLAIN
    dense = "send the dense values (tensor.dequantize(), tensor.full_tensor())"
    raise IntegrityError(
        "a tensor has no storage of its own to copy from",
        where=name,
        expected="a plain tensor with storage",
        got=f"{given}, shape {list(tensor.shape)}" + (", nothing allocated" if freed else ""),
        remedy="bring the weights back (gather, load them) before the push" if freed else dense,
        names=(name,),
    )


def _local(name: str, tensor: torch.Tensor) -> torch.Tensor:
    library = sys.modules.get("torch.distributed.tensor")
    if library is None or not isinstance(tensor, library.DTensor):
        return tensor
    placements = tensor.placements
    if all(placement.is_replicate() for placement in placements):
        local: torch.Tensor = tensor.to_local()
        return local
    raise ConfigError(
        "sharded tensors cannot be pushed yet",
        where=name,
        expected="a plain tensor, or a DTensor that is replicated on every dimension of its mesh",
        got=f"a DTensor placed {placements}",
        remedy="push tensor.full_tensor() until sharded pushes are supported",
        names=(name,),
    )
