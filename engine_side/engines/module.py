"""Any `torch.nn.Module` as an engine: an evaluation copy, a reference model, a reward model.

A module has no loader of its own, so its plan is the identity over its names, or what `canonical` says of a module
whose names are not the checkpoint's. It has no post-load step and generates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from pathlib import Path
from threading import get_ident

import torch
from torch import nn

from bridge.errors import ConfigError, EngineQuarantined, NotFound, ShapeMismatch, UnexpectedTensor, UnsupportedLora
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Move, Routes
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import claim
from engine_side.live.inplace import reflect, twin_parameter
from engine_side.protocol import LoraView, Prompts

RunJob = Callable[[bytes], None]
"""`engine_side.worker.rank.Rank.run` of this process."""


Canonical = Callable[[nn.Module], Routes]
"""Given the live module, says how checkpoint names map onto it."""


class ModuleDriver:
    """The driver half: one rank, in this process. `module` is the live module; never moved, copied or replaced."""

    kind = "module"
    ranks = 1
    can_generate = False
    checkpoint: Path | None = None
    max_prompt: int | None = None
    cache_grain = 0
    lora: LoraLimits | None = None

    def __init__(self, module: nn.Module, canonical: Canonical | None = None) -> None:
        self.module = module
        self._canonical = canonical
        self._run: RunJob | None = None
        self._bindings: _Bindings | None = None
        self._apart: frozenset[int] | None = None

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run the job here, in the calling thread."""
        deadline.check("a job on a module")
        if self._run is None:
            from engine_side.worker.rank import Rank

            self._run = Rank(ModuleRankHost(self.module, self._canonical)).run
        self._run(job)

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Nothing to stop: a module is called by its owner, who does not call it during a push."""

    def resume(self) -> None:
        """Nothing to start."""

    def claim(self, owner: str) -> None:
        claim.take(self.module, self, owner)

    @property
    def refusal(self) -> str | None:
        """The reason of the gate that hangs on the module itself, whichever adapter hung it there."""
        hooks = self.module._forward_pre_hooks.values()
        return next((hook.reason for hook in hooks if isinstance(hook, _Gate)), None)

    def refuse(self, reason: str | None) -> None:
        """Make every call of the module raise EngineQuarantined; None lifts it, also where another adapter did it."""
        hooks = self.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Gate)]:
            del hooks[key]
        if reason is not None:
            self.module.register_forward_pre_hook(_Gate(reason), prepend=True)

    def reset_caches(self) -> bool:
        """There are none."""
        return True

    def publish(self, version: int, adapter: str | None = None) -> None:
        """A module keeps no label, and holds no adapter: raises NotFound for one."""
        if adapter is not None:
            raise _no_lora(adapter)

    @property
    def published(self) -> tuple[int, str | None]:
        """A module keeps no label."""
        return 0, None

    def end_users(self, names: Iterable[str]) -> None:
        """Nobody uses an adapter here."""

    def adapters(self) -> tuple[str, ...]:
        """None: a module has no slots for any."""
        return ()

    def retire(self, names: Iterable[str]) -> None:
        """There are none to drop."""

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling,
        adapter: str = "current",
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        """Raises ConfigError: a module does not generate."""
        raise ConfigError("a plain module does not generate", remedy="attach an inference engine for rollouts")

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Raises ConfigError when one of these storage addresses is the module's own. Looked up anew only when the
        trainer's storages, or the module's tensors, are not those of last time."""
        if storages is self._apart and self._bindings is not None and self._bindings.unchanged():
            return
        shared = sorted(name for name, address in storages_of(self.module).items() if address in storages)
        if shared:
            raise ConfigError(
                "the trainer and the attached module share storage",
                where=f"{', '.join(shared[:5])}{' ...' if len(shared) > 5 else ''}",
                expected="a module with weights of its own",
                got=f"{len(shared)} tensors at the same address on both sides",
                remedy="attach a copy (copy.deepcopy(module))",
                names=tuple(shared),
            )
        self._apart, self._bindings = storages, _Bindings(self.module)

    def close(self) -> None:
        """Give up the claim; the module stays its owner's, and gated if it holds weights that nobody verified."""
        claim.give_up(self.module, self)


class ModuleRankHost:
    """The rank half."""

    rank = 0

    def __init__(self, module: nn.Module, canonical: Canonical | None = None) -> None:
        self._module = module
        self._canonical = canonical
        self._routes: Routes | None = None
        self._routes_of: dict[str, torch.Size] = {}

    @property
    def model(self) -> nn.Module:
        return self._module

    def skeleton(self) -> nn.Module:
        """The module tree with meta tensors: same classes, same attributes by reference, no hooks, no memory."""
        return _mirror(self._module, {}, {})

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Strict: an unknown name is UnexpectedTensor, another shape ShapeMismatch."""
        tensors = _by_name(skeleton)
        routes = self._current_routes()
        by_name: dict[str, list[Move]] = {}
        for move in routes.moves if routes is not None else ():
            by_name.setdefault(move.tensor, []).append(move)
        for name, weight in weights:
            if routes is None:
                _copy_whole(name, weight, tensors)
                continue
            _expect(name, weight, routes.shapes.get(name))
            for move in by_name.get(name, ()):
                live = tensors[move.target].detach()
                into = live.as_strided(move.dest.shape, move.dest.strides, live.storage_offset() + move.dest.offset)
                into.copy_(weight.as_strided(move.source.shape, move.source.strides, move.source.offset))

    def _current_routes(self) -> Routes | None:
        """Asked again only when the module has other tensors than last time (a resized embedding)."""
        if self._canonical is None:
            return None
        shapes = {name: tensor.shape for name, tensor in _by_name(self._module).items()}
        if self._routes is None or shapes != self._routes_of:
            self._routes, self._routes_of = self._canonical(self._module), shapes
        return self._routes

    def post_load(self, module: nn.Module) -> bool:
        """A plain module has no such step."""
        return False

    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Only modules without children are sure to be callable on one batch of rows.

        In eval mode, on copies of its buffers and with random numbers of its own: a look must not move the statistics
        of a normalisation layer, nor the random state of the trainer that lives in this process. Modules of a skeleton
        are in eval mode; for a live one that trains, a shallow copy is called, so that its owner, who may be using it
        in another thread, never sees it in another mode.
        """
        if module._modules:
            raise NotImplementedError(f"{type(module).__name__} has children")
        own = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
        called = module
        if module.training:
            called = nn.Module.__new__(type(module))
            called.__dict__.update(module.__dict__, _buffers=dict(module._buffers), training=False)
        # Not torch.manual_seed: it also seeds every device, those that nobody has used yet included.
        generator = torch.default_generator
        state = generator.get_state()
        gates = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Gate)]
        try:
            generator.manual_seed(0)
            for gate in gates:
                gate.guest = get_ident()
            y: object = torch.func.functional_call(called, own, (x,)) if own else called(x)
        finally:
            for gate in gates:
                gate.guest = None
            generator.set_state(state)
        if not isinstance(y, torch.Tensor):
            raise NotImplementedError(f"{type(module).__name__} does not return one tensor")
        return y

    def prompt_logprobs(self, prompts: Prompts, adapter: str | None = None) -> list[list[float]]:
        """Raises ConfigError: a plain module has no canary."""
        raise ConfigError("a plain module computes no prompt log-probabilities", remedy="verify='weights'")

    def untie(self, names: Sequence[str]) -> bool:
        """Never: the module is its owner's, who tied what is tied."""
        return False

    def plan_lora(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Mapping[str, str]:
        """Raises UnsupportedLora: a plain module has no slots for adapters."""
        raise self._unsupported()

    def load_lora(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Raises UnsupportedLora."""
        raise self._unsupported()

    def lora_views(self, name: str) -> Sequence[LoraView]:
        """Raises NotFound: there are none."""
        raise _no_lora(name)

    def remove_lora(self, name: str) -> None:
        """There are none to drop."""

    def _unsupported(self) -> UnsupportedLora:
        return UnsupportedLora(
            "a plain module takes no LoRA adapters",
            where=type(self._module).__name__,
            expected="an engine with LoRA slots",
            got="torch.nn.Module",
            remedy="push merged weights (mode='merged')",
        )


def _no_lora(name: str) -> NotFound:
    return NotFound("a plain module holds no adapters", where="adapter", got=repr(name))


def attach(engine: object, canonical: Canonical | None = None) -> ModuleDriver | None:
    """The adapter of a module of this process; None for anything else."""
    return ModuleDriver(engine, canonical) if isinstance(engine, nn.Module) else None


def storages_of(module: nn.Module) -> dict[str, int]:
    """Name -> storage address of every parameter and buffer that has memory."""
    found = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: t.untyped_storage().data_ptr() for name, t in found if t.device.type != "meta" and t.numel()}


class _Bindings:
    """Which tensors hang on a tree's modules and where they lie, to see cheaply whether that is still so."""

    def __init__(self, module: nn.Module) -> None:
        self._registries = [r for m in module.modules() for r in (m._parameters, m._buffers) if r]
        self._values = self._current()
        self._tensors = [v for v in self._values if isinstance(v, torch.Tensor) and v.device.type != "meta"]
        self._addresses = [t.data_ptr() for t in self._tensors]

    def _current(self) -> list[object]:
        return [value for registry in self._registries for value in registry.values()]

    def unchanged(self) -> bool:
        """About 0.4 us per tensor."""
        now = self._current()
        return (
            len(now) == len(self._values)
            and all(map(is_, now, self._values))
            and [t.data_ptr() for t in self._tensors] == self._addresses
        )


class _Gate:
    """A forward pre-hook that lets nobody in. It is the whole state of a refusal, so a copy of a module that holds
    torn weights refuses as well."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.guest: int | None = None

    def __call__(self, module: nn.Module, args: object) -> None:
        if self.guest == get_ident():
            return  # a probe: what lifts the gate is that a version was verified behind it
        raise EngineQuarantined(
            "this module holds weights that nobody verified",
            where=type(module).__name__,
            got=self.reason,
            remedy="push again, or call rollback()",
        )


def _mirror(module: nn.Module, made: dict[int, nn.Module], tensors: dict[int, torch.Tensor]) -> nn.Module:
    """A module object of the same class whose registries are its own; no code of the module runs."""
    if id(module) in made:
        return made[id(module)]
    copy = nn.Module.__new__(type(module))
    made[id(module)] = copy
    blank = nn.Module().__dict__
    hooks = {key: value for key, value in blank.items() if "hook" in key}
    copy.__dict__.update({**blank, **module.__dict__, **hooks, "training": False})
    copy.__dict__["_parameters"] = {name: _meta(p, tensors) for name, p in module._parameters.items()}
    copy.__dict__["_buffers"] = {name: _meta(b, tensors) for name, b in module._buffers.items()}
    own = {id(t): tensors[id(t)] for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
    copy.__dict__.update({n: reflect(v, own) for n, v in copy.__dict__.items() if n not in blank})
    copy.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    copy.__dict__["_modules"] = {
        name: None if child is None else _mirror(child, made, tensors) for name, child in module._modules.items()
    }
    return copy


def _meta(tensor: torch.Tensor | None, tensors: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """The same tensor object gives the same meta tensor, and views of one storage stay views of one storage."""
    if tensor is None:
        return None
    if id(tensor) not in tensors:
        storage = tensor.untyped_storage()
        base = tensors.setdefault(-storage._cdata, _flat_meta(tensor, storage.nbytes()))
        view = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        tensors[id(tensor)] = twin_parameter(tensor, view)
    return tensors[id(tensor)]


def _flat_meta(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes // tensor.element_size(), dtype=tensor.dtype, device="meta")


def _by_name(module: nn.Module) -> dict[str, torch.Tensor]:
    found = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(found)


def _copy_whole(name: str, weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    into = tensors.get(name)
    _expect(name, weight, None if into is None else tuple(into.shape))
    if into is not None:
        into.detach().copy_(weight)


def _expect(name: str, weight: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise UnexpectedTensor(
            "the attached module has no such tensor",
            where=name,
            expected="a name of its named_parameters() or persistent buffers",
            got=f"shape {list(weight.shape)}",
            remedy="bind the model, so that live names become checkpoint names, or leave this tensor out",
            names=(name,),
        )
    if tuple(weight.shape) != shape:
        raise ShapeMismatch(
            "a tensor's shape does not fit the attached module",
            where=name,
            expected=f"{list(shape)}",
            got=f"{list(weight.shape)}",
            remedy="the module must have the trainer's configuration",
            names=(name,),
        )
