"""Guards around a forward of a shielded copy: no way back into the live model, no write to its weights, no collective;
and a comparison of the live model before and after."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from bridge.errors import ConfigError, DeadlineExceeded, IntegrityError
from bridge.protocol.deadline import Deadline
from trainer_side.shielded.model_copy import sharded_error

_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "symm_mem"})
"""Namespaces of torch's operations that wait for other processes."""
_CONTAINERS = (list, tuple, dict)
_NO_FORWARD = "push with verify='weights': read-back and probes need no forward of the trainer"


class LiveTensorReached(Exception):
    """A forward of the copy came back to the live model, for instance through a closure over its forward.

    Attributes:
        name: the parameter or buffer that it used.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class ReferenceGuard(TorchDispatchMode):
    """Refuses, before they run, operations of a forward that must not happen beside a live model.

    Args:
        model: the live model.
        lent: tensors of the model, registered or not, whose storage a copy uses.
        live: False lets the model's own tensors be read: for its own forward.
        deadline: no operation begins after it; one that has begun is not interrupted.

    Inside, compiled functions run eagerly: Dynamo would see the mode, and mark their code, which the live model shares,
    as never to be compiled.

    Inside, an operation raises LiveTensorReached when it is given a parameter or buffer object of the model, and
    ConfigError when it would write to the storage of a parameter or of a lent tensor, or wait for other processes;
    DeadlineExceeded when the time is over.
    """

    supports_higher_order_operators = True  # torch refuses them else; they have no schema to judge by

    def __init__(
        self,
        model: nn.Module,
        lent: Iterable[torch.Tensor] = (),
        *,
        live: bool = True,
        deadline: Deadline | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._deadline = deadline
        named = dict(_tensors(model))
        self._live: Mapping[int, str] = {id(t): name for name, t in named.items()} if live else {}
        self._eager: Any = None
        self._kept = named  # an id says something only while its tensor lives
        self._storages = {address: "a tensor that hangs on the model" for t in lent for address in _storages(t)}
        weights = {name: t for name, t in named.items() if isinstance(t, nn.Parameter)}
        self._storages |= {address: name for name, t in weights.items() for address in _storages(t)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # everything is eager: without this torch leaves Dynamo anew at every operation

    def __enter__(self) -> Self:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            self._eager = torch.compiler.set_stance("force_eager")
            self._eager.__enter__()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._eager is not None:
            self._eager.__exit__(kind, error, trace)
            self._eager = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._deadline is not None and self._deadline.expired:
            raise _too_late(func)
        kwargs = kwargs or {}
        live = self._live  # what follows runs for every operation: no call for arguments that are no containers
        for value in (*args, *kwargs.values()) if live else ():
            if id(value) in live:
                raise LiveTensorReached(live[id(value)])
            if type(value) in _CONTAINERS:
                for tensor in _found_in(value):
                    if id(tensor) in live:
                        raise LiveTensorReached(live[id(tensor)])
        if isinstance(func, OpOverload):
            for place, key in _written(func):
                self._refuse_write(func, args[place] if place < len(args) else kwargs.get(key))
        return func(*args, **kwargs)

    def _refuse_write(self, func: Any, given: Any) -> None:
        for tensor in _found_in(given):
            name = next((self._storages[a] for a in _storages(tensor) if a in self._storages), None)
            if name is not None:
                raise ConfigError(
                    "a forward of this model would write to its weights, so it gives no canary",
                    where=name,
                    expected="a forward that moves nothing",
                    got=str(func),
                    remedy=_NO_FORWARD,
                )


def _too_late(func: Any) -> DeadlineExceeded:
    return DeadlineExceeded(
        "a forward of the trainer's model outlasted the push's timeout",
        where=f"the forward, before {func}",
        expected="a forward that ends within timeout_s, together with the snapshot",
        got="operations left to run",
        remedy="raise timeout_s; or push with verify='weights', which needs no forward of the whole model",
    )


@functools.cache
def _written(func: OpOverload) -> tuple[tuple[int, str], ...]:
    """The arguments (place, name) of an operation whose elements it writes. Raises ConfigError for a collective."""
    if func.namespace in _COLLECTIVES:
        raise sharded_error(f"the forward of the bound model, at {func}")
    if not func._schema.is_mutable or _only_points_elsewhere(func):
        return ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _only_points_elsewhere(func: Any) -> bool:
    """True for operations that change which elements a tensor object shows, and no element: `set_`, `transpose_`."""
    return torch.Tag.inplace_view in func.tags or func.overloadpacket is torch.ops.aten.set_


@dataclass(frozen=True)
class _TensorFacts:
    """Holds what a forward must not change of a tensor: the object, where it lies, how often it was written, what hangs
    on it."""

    tensor: torch.Tensor
    facts: tuple[Any, ...]
    attributes: dict[str, Any]


class LiveState:
    """The identities of everything in a live model, taken before a forward of its copy."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._flags = [(module, module.training) for module in model.modules()]
        self._tensors = {name: _facts(t) for name, t in _tensors(model)}

    def require_unchanged(self) -> None:
        """Raise IntegrityError, naming what changed, when the model is not as it was."""
        changed = [type(module).__name__ for module, training in self._flags if module.training != training]
        now = dict(_tensors(self._model))
        changed += sorted(self._tensors.keys() ^ now.keys())
        for name, before in self._tensors.items():
            if name in now and not _same(before, _facts(now[name])):
                changed.append(name)
        if changed:
            raise IntegrityError(
                "the bound model changed while the canary's reference was computed",
                where=", ".join(changed[:5]),
                expected="every parameter and buffer as it was: object, storage, shape, version and attributes",
                got=f"{len(changed)} changed",
                remedy="push between steps, while nothing else uses the model; if it is the model's own forward, "
                "push with verify='weights'",
                names=tuple(changed),
            )


def _facts(tensor: torch.Tensor) -> _TensorFacts:
    version = None if tensor.is_inference() else tensor._version  # inference tensors count no writes
    facts = (tuple(_storages(tensor)), tensor.shape, tensor.dtype, tensor.device, version, tensor.requires_grad)
    return _TensorFacts(tensor, facts, dict(vars(tensor)))


def _same(one: _TensorFacts, other: _TensorFacts) -> bool:
    if one.tensor is not other.tensor or one.facts != other.facts:
        return False
    mine, theirs = one.attributes, other.attributes
    return mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every registered parameter and buffer by its live path, without a call of the model's own methods."""
    for path, module in nn.Module.named_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            continue  # makes other tensor objects each time; `ModelCopier` refuses it
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor


def _storages(tensor: torch.Tensor) -> Iterator[int]:
    """The address of a tensor's storage, of a wrapper those of the tensors inside it; none where it has none (meta)."""
    wraps: bool = is_traceable_wrapper_subclass(tensor)  # a flag of its own: mypy knows no such subclass
    if wraps:
        held: Any = tensor
        inner = [getattr(held, name) for name in held.__tensor_flatten__()[0]]  # a device mesh may be among them
        for part in inner:
            if isinstance(part, torch.Tensor):
                yield from _storages(part)
        return
    try:
        address = int(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return
    if address:
        yield address


def _found_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _found_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _found_in(item)
