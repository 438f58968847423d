"""Any `torch.nn.Module` as an engine: an evaluation copy, a reference model, a reward model.

A module has no loader of its own, so its plan is the identity over its names or, where they are not the checkpoint's,
the routes that `canonical` gives. It has no post-load step and generates nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from pathlib import Path
from threading import get_ident

import torch
from torch import nn

from bridge.errors import (
    GATHER,
    ConfigError,
    EngineQuarantined,
    NotFound,
    ShapeMismatch,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Move, Routes
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common import claim
from engine_side.engines.common.refusals import require_apart
from engine_side.live.inplace import meta_twin, reflect
from engine_side.protocol import LoraView, PromptBatch

CanonicalRoutes = Callable[[nn.Module], Routes]
"""Maps checkpoint names onto the live module that it is given."""


class ModuleDriver:
    """Drives one module of this process, its only rank. `module` is the live one: never moved, copied or replaced."""

    kind = "module"
    ranks = 1
    can_generate = False
    checkpoint: Path | None = None
    max_prompt: int | None = None
    cache_grain = 0
    lora: LoraLimits | None = None

    def __init__(self, module: nn.Module, canonical: CanonicalRoutes | None = None) -> None:
        self.module = module
        self._canonical = canonical
        self._run: Callable[[bytes], None] | None = None
        self._apart: frozenset[int] | None = None
        self._registries: list[Mapping[str, torch.Tensor | None]] = []
        self._seen: list[torch.Tensor | None] = []
        self._addresses: list[int] = []

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run the job in the calling thread; blocks until it is done. Raises DeadlineExceeded only before it."""
        if time.monotonic() >= deadline.at:
            deadline.check("a job on a module")
        if self._run is None:
            from engine_side.worker.rank import Rank

            self._run = Rank(ModuleRankHost(self.module, self._canonical)).run
        self._run(job)

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Do nothing: a module is called by its owner, who does not call it during a push."""

    def resume(self) -> None:
        """Do nothing."""

    def claim(self, owner: str) -> None:
        claim.take(self.module, self, owner)

    @property
    def refusal(self) -> str | None:
        """The reason of the gate on the module itself, whichever driver put it there."""
        hooks = self.module._forward_pre_hooks.values()
        return next((hook.reason for hook in hooks if isinstance(hook, _Gate)), None)

    def refuse(self, reason: str | None) -> None:
        """Make every call of the module raise EngineQuarantined; None lifts it, also where another driver did it."""
        hooks = self.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Gate)]:
            del hooks[key]
        if reason is not None:
            self.module.register_forward_pre_hook(_Gate(reason), prepend=True)

    def reset_caches(self) -> bool:
        """Return True: a module has no caches."""
        return True

    def publish(self, version: int, adapter: str | None = None) -> None:
        """Do nothing: a module keeps no version. Raises NotFound for a LoRA, of which it holds none."""
        if adapter is not None:
            raise _no_lora(adapter)

    @property
    def published(self) -> tuple[int, str | None]:
        """Version 0 and no LoRA: a module keeps neither."""
        return 0, None

    def end_users(self, names: Iterable[str]) -> None:
        """Do nothing: a module holds no LoRA."""

    def loaded_loras(self) -> tuple[str, ...]:
        """Return no names: a module has no LoRA slots."""
        return ()

    def retire(self, names: Iterable[str]) -> None:
        """Do nothing: a module holds no LoRA."""

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        adapter: str = "current",
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        """Raise ConfigError: a module does not generate."""
        raise ConfigError(
            "a plain module does not generate",
            where="engine",
            expected="an engine that generates",
            got="a torch.nn.Module",
            remedy="attach an inference engine for rollouts",
        )

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Raise ConfigError when one of these storage addresses is the module's own. Looked up again only when the
        trainer's storages, or the module's tensors, have changed since the last call; about 0.4 us per tensor."""
        now = [tensor for registry in self._registries for tensor in registry.values()]
        same = storages is self._apart and len(now) == len(self._seen) and all(map(is_, now, self._seen))
        if same and self._addresses == [t.data_ptr() for t in now if t is not None and t.device.type != "meta"]:
            return
        remedy = "attach a copy (copy.deepcopy(module))"
        require_apart(_by_name(self.module).items(), storages, "attached module", remedy)
        self._apart = storages
        self._registries = [r for m in self.module.modules() for r in (m._parameters, m._buffers) if r]
        self._seen = [tensor for registry in self._registries for tensor in registry.values()]
        self._addresses = [t.data_ptr() for t in self._seen if t is not None and t.device.type != "meta"]

    def close(self) -> None:
        """Give up the claim. The module stays as it is, gated if it holds unverified weights."""
        claim.give_up(self.module, self)


class ModuleRankHost:
    """Gives the bridge's rank the live module of this process."""

    rank = 0

    def __init__(self, module: nn.Module, canonical: CanonicalRoutes | None = None) -> None:
        self.model = module
        self._canonical = canonical
        self._routes: Routes | None = None
        self._routes_of: dict[str, torch.Size] = {}

    def skeleton(self) -> nn.Module:
        """Copy the module tree with meta tensors: same classes, same attributes by reference, no hooks, no memory."""
        return _mirror(self.model, {}, {})

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy checkpoint tensors into the skeleton. Strict: raises UnexpectedTensor for an unknown name, ShapeMismatch
        for another shape."""
        tensors = _by_name(skeleton)
        routes = self._current_routes()
        by_name: dict[str, list[Move]] = {}
        for move in routes.moves if routes is not None else ():
            by_name.setdefault(move.tensor, []).append(move)
        shapes = {name: tuple(into.shape) for name, into in tensors.items()} if routes is None else routes.shapes
        for name, weight in weights:
            _expect(name, weight, shapes.get(name))
            if routes is None:
                tensors[name].detach().copy_(weight)
            for move in by_name.get(name, ()):
                live = tensors[move.target].detach()
                into = live.as_strided(move.dest.shape, move.dest.strides, live.storage_offset() + move.dest.offset)
                into.copy_(weight.as_strided(move.source.shape, move.source.strides, move.source.offset))

    def _current_routes(self) -> Routes | None:
        """Computed again only when the module's tensors have changed (a resized embedding)."""
        if self._canonical is None:
            return None
        shapes = {name: tensor.shape for name, tensor in _by_name(self.model).items()}
        if self._routes is None or shapes != self._routes_of:
            self._routes, self._routes_of = self._canonical(self.model), shapes
        return self._routes

    def post_load(self, module: nn.Module) -> bool:
        """Return False: a plain module has no such step."""
        return False

    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call one module alone, in eval mode, on copies of its buffers and with random numbers of its own: a probe
        must not move a normalisation layer's statistics, nor the random state of the trainer in this process.

        For a live module that trains a shallow copy is called: its owner, who may be using it in another thread, never
        sees it in another mode.

        Raises NotImplementedError for a module with children: only one without is sure to take one batch of rows.
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

    def prompt_logprobs(self, prompts: PromptBatch, lora: str | None = None) -> list[list[float]]:
        """Raise ConfigError: a plain module has no canary."""
        raise ConfigError(
            "a plain module computes no prompt log-probabilities",
            where=type(self.model).__name__,
            expected="an engine that generates",
            got="a torch.nn.Module",
            remedy="verify='weights'",
        )

    def untie(self, names: Sequence[str]) -> bool:
        """Return False: the module's owner tied its tensors, and may rely on it."""
        return False

    def plan_lora(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Mapping[str, str]:
        """Raise UnsupportedLora: a plain module has no LoRA slots."""
        raise UnsupportedLora(
            "a plain module takes no LoRA",
            where=type(self.model).__name__,
            expected="an engine with LoRA slots",
            got="torch.nn.Module",
            remedy="push merged weights (mode='merged')",
        )

    def load_lora(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Raise UnsupportedLora, as `plan_lora`."""
        self.plan_lora((), spec)

    def lora_views(self, name: str) -> Sequence[LoraView]:
        """Raise NotFound: a plain module has no LoRA slots."""
        raise _no_lora(name)

    def remove_lora(self, name: str) -> None:
        """Do nothing: there are none."""


def _no_lora(name: str) -> NotFound:
    remedy = "push merged weights (mode='merged')"
    return NotFound("a plain module holds no LoRA", where="adapter", expected="no LoRA", got=repr(name), remedy=remedy)


def attach(engine: object, canonical: CanonicalRoutes | None = None) -> ModuleDriver | None:
    """Return the driver of a module of this process; None for any other object."""
    return ModuleDriver(engine, canonical) if isinstance(engine, nn.Module) else None


class _Gate:
    """A forward pre-hook that refuses every call. It is the whole state of a refusal, so a copy of a module that holds
    torn weights refuses as well."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.guest: int | None = None

    def __call__(self, module: nn.Module, args: object) -> None:
        if self.guest == get_ident():
            return  # a probe: a version has to be verified behind the gate before it is lifted
        raise EngineQuarantined(
            "this module holds weights that nobody verified",
            where=type(module).__name__,
            expected="a verified version",
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
    for kind in ("_parameters", "_buffers"):
        registry = module.__dict__[kind].items()
        copy.__dict__[kind] = {name: None if t is None else meta_twin(t, tensors) for name, t in registry}
    own = {id(t): tensors[id(t)] for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
    copy.__dict__.update({n: reflect(v, own) for n, v in copy.__dict__.items() if n not in blank})
    copy.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    copy.__dict__["_modules"] = {
        name: None if child is None else _mirror(child, made, tensors) for name, child in module._modules.items()
    }
    return copy


def _by_name(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


def _expect(name: str, weight: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise UnexpectedTensor(
            "the attached module has no such tensor",
            where=name,
            expected="a name of its named_parameters() or persistent buffers",
            got=f"shape {list(weight.shape)}",
            remedy="bind the model (b.bind(model)), so that live names become checkpoint names, or attach a module of "
            "the same class and configuration",
            names=(name,),
        )
    if tuple(weight.shape) != shape:
        raise ShapeMismatch(
            "a tensor's shape does not fit the attached module",
            where=name,
            expected=f"{list(shape)}",
            got=f"{list(weight.shape)}",
            remedy="attach a module of the trainer's configuration" if weight.numel() else GATHER,
            names=(name,),
        )
