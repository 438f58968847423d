"""Check what is given to `push`: (name, tensor) pairs, and tensors that are plain, dense and have values in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bridge.errors import (
    GATHER,
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    IntegrityError,
    MissingTensor,
    ShapeMismatch,
    UnexpectedTensor,
)

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def require_plain(name: str, tensor: object) -> torch.Tensor:
    """Return the plain tensor whose memory holds this tensor's values.

    A replicated DTensor becomes its local tensor, a subclass the plain tensor that shares its memory, and a view that
    is negated only when read (`is_neg()`) a tensor whose memory holds its values.

    Raises, naming the tensor:
        ConfigError: not a tensor, or a sharded one.
        IntegrityError: it has no values here (lazy, meta, freed, partitioned).
        DtypeMismatch: it is sparse or quantised.
    """
    if not isinstance(tensor, torch.Tensor):
        raise not_pairs(name, type(tensor).__name__)
    require_initialised(name, tensor)
    _require_gathered(name, tensor)
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
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    if tensor.numel() and addresses_of([tensor]) in (None, [0]):
        # A wrapper around other tensors, or a tensor whose storage was freed: none of its elements is in memory.
        dense = "send the dense values (tensor.dequantize(), tensor.full_tensor())"
        raise IntegrityError(
            "a tensor has no storage of its own to copy from",
            where=name,
            expected="a plain tensor with storage",
            got=f"{given}, shape {list(tensor.shape)}" + (", nothing allocated" if plain else ""),
            remedy="bring the weights back (gather, load them) before the push" if plain else dense,
            names=(name,),
        )
    if not plain:  # what a subclass adds has no say in a copy
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            tensor = tensor.detach().as_subclass(torch.Tensor)
    return tensor.resolve_neg()


def require_module(model: object) -> nn.Module:
    """Return the model that was given to `bind`. Raises ConfigError for an object that is no module."""
    if isinstance(model, nn.Module):
        return model
    raise ConfigError(
        "only a module can be bound",
        where="the model given to bind",
        expected="a torch.nn.Module",
        got=type(model).__name__,
        remedy="bind the model that is trained, not its state dict or its trainer",
    )


def require_initialised(name: str, tensor: torch.Tensor) -> None:
    """Raise IntegrityError for a lazy module's parameter or buffer, which has no shape before the first forward."""
    if is_lazy(tensor):
        raise IntegrityError(
            "a lazy module's tensor has neither shape nor values yet",
            where=name,
            expected="a tensor with storage",
            got=type(tensor).__name__,
            remedy="run one forward of the model, which initialises it, first",
            names=(name,),
        )


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor with all of its values: ZeRO-3 leaves an empty one in its place between steps, and
    notes it as `ds_shape`."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _require_gathered(name: str, tensor: torch.Tensor) -> None:
    whole = whole_shape(tensor)
    if whole != tuple(tensor.shape):
        raise IntegrityError(
            "a tensor is partitioned over the ranks, and its values are not here",
            where=name,
            expected=f"shape {list(whole)}",
            got=f"shape {list(tensor.shape)}",
            remedy=GATHER,
            names=(name,),
        )


def addresses_of(sources: Sequence[torch.Tensor]) -> list[int] | None:
    """Return each tensor's address (0 without memory); None when some tensor cannot have one (meta, sparse)."""
    try:
        return [t.data_ptr() for t in sources]
    except RuntimeError:
        return None


def stream_pairs(named: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the iterable given to `push`, one pair at a time. Raises ConfigError when it holds no pairs."""
    if isinstance(named, Mapping):
        named = named.items()
    try:
        stream = iter(named)
    except TypeError as error:
        raise not_pairs("the argument of push", str(error)) from error
    for count, item in enumerate(stream):
        try:
            name, tensor = item
        except (TypeError, ValueError) as error:
            raise not_pairs(f"item {count}", f"{type(item).__name__}: {error}") from error
        yield name, tensor


def read_pairs(named: NamedTensors) -> tuple[list[str], list[torch.Tensor]]:
    """Exhaust the iterable given to `push` into names and tensors. Raises ConfigError when it holds no pairs."""
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    # Two plain lists: thousands of kept tuples would set the garbage collector off in every push.
    for name, tensor in stream_pairs(named):
        names.append(name)
        tensors.append(tensor)
    return names, tensors


class NameIndex:
    """The names of one push in the order they came, each tensor once; shared by both name resolvers.

    Attributes:
        index: the model's own name of a tensor -> its position in the push.
    """

    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self._given: list[str] = []

    def require_text(self, given: str) -> None:
        """Raise ConfigError when the next name is not a str."""
        if not isinstance(given, str):
            raise not_pairs(f"item {len(self._given)}", f"a name of type {type(given).__name__}")

    def add(self, clean: str, given: str) -> None:
        """Note that the tensor `clean` came under the name `given`. Raises DuplicateTensor the second time."""
        if clean in self.index:
            earlier = self._given[self.index[clean]]
            raise DuplicateTensor(
                "the same tensor was sent twice",
                where=clean,
                expected="each name once",
                got=repr(given) if given == earlier else f"{earlier!r} and {given!r}",
                remedy="push one iterable over one model",
                names=(clean,),
            )
        self.index[clean] = len(self._given)
        self._given.append(given)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ShapeMismatch when a tensor that was sent does not have the bound model's shape."""
    if tuple(tensor.shape) != tuple(shape):
        again = "bind the model whose tensors are pushed (b.bind(model)), again if its layers were resized"
        raise ShapeMismatch(
            "a tensor does not have the bound model's shape",
            where=name,
            expected=str(list(shape)),
            got=str(list(tensor.shape)),
            remedy=again if tensor.numel() else GATHER,
            names=(name,),
        )


def unknown_name(name: str, expected: str) -> UnexpectedTensor:
    """Build the error for a name that the bound model does not have; `expected` lists the kinds of names it has."""
    return UnexpectedTensor(
        "the bound model has no tensor of this name",
        where=name,
        expected=expected,
        got=repr(name),
        remedy="push the tensors of the bound model, or bind the model that these belong to (b.bind(model))",
        names=(name,),
    )


def nothing_sent() -> MissingTensor:
    """Build the error for an empty push."""
    return MissingTensor(
        "nothing was sent: the iterable is empty",
        where="the iterable given to push",
        expected="at least one (name, tensor) pair",
        got="none",
        remedy="a generator can be used only once: call model.named_parameters() again for each push",
    )


def not_pairs(where: str, got: str) -> ConfigError:
    """Build the error for an argument of `push` that is no iterable of (name, tensor) pairs."""
    return ConfigError(
        "push takes an iterable of (name, tensor) pairs",
        where=where,
        expected="pairs of str and torch.Tensor",
        got=got,
        remedy="push model.named_parameters()",
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
