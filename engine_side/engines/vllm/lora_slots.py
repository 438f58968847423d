"""Adapters of one vLLM worker, kept in memory: which of its slots they go to is found by tracing vLLM's own `set_lora`.

vLLM reads adapters from folders; its managers take one as well that was made from tensors. A name is never used twice,
nor is the id that is derived from it: vLLM's prefix cache is keyed by the name, its slots by the id.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import xxhash
from torch import nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name

from bridge.errors import BridgeError, ConfigError, NotFound, ShapeMismatch, UnexpectedTensor, UnsupportedLora
from bridge.model.dtypes import dtype_name
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Fill, Move, Region
from bridge.tracing.recorder import Recorder
from engine_side.plan.bake import stand_ins, uncovered_fills
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.protocol import LoraView

_PEFT = "base_model.model."
_ID_BITS = (1 << 53) - 1


@dataclass(frozen=True)
class SlotLayout:
    """Where vLLM would put an adapter: moves into, and zeros around it in, the stacks of one slot. `stacks` maps the
    targets of the moves to (layer, attribute, index in a tuple or -1)."""

    moves: tuple[Move, ...]
    zeros: tuple[Fill, ...]
    stacks: Mapping[str, tuple[nn.Module, str, int]]


@dataclass(frozen=True)
class _LoadedLora:
    adapter_id: int
    shapes: Mapping[str, tuple[int, ...]]
    placed: SlotLayout


class VllmLoraSlots:
    """Over one worker that was started with `enable_lora=True`. Used by the thread that runs the worker."""

    def __init__(self, worker: Any) -> None:
        self._runner = worker.model_runner
        self._limits = worker.vllm_config.lora_config
        self._vocabulary = int(worker.vllm_config.model_config.get_vocab_size())
        self._held: dict[str, _LoadedLora] = {}
        self._used: set[str] = set()

    @property
    def names(self) -> dict[str, int]:
        """Name -> id of the adapters that the bridge has loaded and vLLM still holds."""
        there = self._manager.list_adapters()
        return {name: held.adapter_id for name, held in self._held.items() if held.adapter_id in there}

    def request(self, name: str) -> LoRARequest:
        """What vLLM's requests carry for a loaded adapter. Raises NotFound."""
        return lora_request(name, self._of(name).adapter_id)

    def plan(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> dict[str, str]:
        """Tensor -> dtype of the slot that it goes to. Raises UnexpectedTensor, ShapeMismatch, UnsupportedLora."""
        placed = self._place(tensors, spec)
        self._require_evictable()
        return {move.tensor: dtype_name(_stack(*placed.stacks[move.target]).dtype) for move in placed.moves}

    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write an adapter into a free slot and pin it there. Where none is free, the adapter that was used least
        recently leaves its slot, as vLLM has it. Raises ConfigError where all are pinned or in use, or for a name that
        was used."""
        infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]
        placed = self._place(infos, spec)
        self._make_room(name)
        adapter_id = id_of(name)
        model = self._lora_model(adapter_id, {n: t.clone() for n, t in tensors.items()}, spec, self._runner.device)
        self._used.add(name)
        try:
            self._manager.add_adapter(model)
            self._manager.activate_adapter(adapter_id)
            self._manager.pin_adapter(adapter_id)
        except BaseException:
            self._manager.remove_adapter(adapter_id)
            raise
        self._held[name] = _LoadedLora(adapter_id, {i.name: i.shape for i in infos}, placed)

    def views(self, name: str) -> list[LoraView]:
        """Raises NotFound."""
        held = self._of(name)
        slot = self._manager.lora_index_to_id.index(held.adapter_id)
        zeros: dict[str, list[torch.Tensor]] = {}
        for fill in held.placed.zeros:
            zeros.setdefault(fill.target, []).append(_region(_stack(*held.placed.stacks[fill.target])[slot], fill.dest))
        out: list[LoraView] = []
        for move in held.placed.moves:
            live = _stack(*held.placed.stacks[move.target])[slot]
            view, index = _box(live, move, held.shapes[move.tensor])
            out.append(LoraView(move.tensor, view, index, tuple(zeros.pop(move.target, ()))))
        return out

    def remove(self, name: str) -> None:
        """Unknown names are ignored."""
        held = self._held.pop(name, None)
        if held is not None:
            self._manager.remove_adapter(held.adapter_id)

    # ---- how -----------------------------------------------------------------------------------------------------

    @property
    def _manager(self) -> Any:
        return self._runner.lora_manager._adapter_manager

    def _of(self, name: str) -> _LoadedLora:
        held = self._held.get(name)
        if held is None or held.adapter_id not in self._manager.list_adapters():
            raise NotFound("this engine holds no such adapter", where="adapter", got=repr(name))
        return held

    def _make_room(self, name: str) -> None:
        if name in self._used:
            raise ConfigError("an adapter's name was used before", where=name, remedy="load it under another name")
        manager, used = self._manager, self._in_use()
        for limit, cache, size in self._caches():
            if len(cache) < size:
                continue
            idle = next((k for k in cache.order if k not in cache.pinned_items and k not in used), None)
            if idle is None:
                raise _full(ConfigError, limit, size, cache, used)
            if cache is manager._active_adapters:
                manager.deactivate_adapter(idle)
            else:
                manager.remove_adapter(idle)

    def _require_evictable(self) -> None:
        """What is in use now may not be when the adapter comes; what is pinned stays."""
        for limit, cache, size in self._caches():
            if len(cache) >= size and all(k in cache.pinned_items for k in cache.order):
                raise _full(UnsupportedLora, limit, size, cache, frozenset())

    def _caches(self) -> tuple[tuple[str, Any, int], ...]:
        """vLLM's argument, its cache and how many it holds: of adapters in memory, and of those in slots."""
        manager = self._manager
        return (
            ("max_cpu_loras", manager._registered_adapters, manager.capacity),
            ("max_loras", manager._active_adapters, manager.lora_slots),
        )

    def _in_use(self) -> frozenset[int]:
        """Ids that requests of this worker ask for, running or kept."""
        state = getattr(self._runner, "lora_state", None)
        if state is not None:
            found = state.lora_requests.values()
        else:
            found = [request.lora_request for request in self._runner.requests.values()]
        return frozenset(request.lora_int_id for request in found if request is not None)

    def _lora_model(
        self, adapter_id: int, tensors: Mapping[str, torch.Tensor], spec: LoraSpec, device: torch.device | str
    ) -> LoRAModel:
        """As vLLM makes one from a folder; alpha = rank, since the scaling is in B."""
        return LoRAModel.from_lora_tensors(
            adapter_id,
            {f"{_PEFT}{name}": tensor for name, tensor in tensors.items()},
            PEFTHelper(r=spec.rank, lora_alpha=spec.rank, target_modules=[]),
            device=str(device),
            dtype=self._limits.lora_dtype,
            model_vocab_size=self._vocabulary,
            weights_mapper=self._mapper(),
        )

    def _mapper(self) -> Any:
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        return None if mapper is None else mapper.get_rename_mapper()

    def _place(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> SlotLayout:
        """Run vLLM's own `set_lora` on layers whose stacks are meta tensors of one slot."""
        if spec.rank > self._limits.max_lora_rank or self._limits.fully_sharded_loras:
            raise UnsupportedLora(
                "the engine's slots cannot hold this adapter",
                where="max_lora_rank, fully_sharded_loras",
                expected=f"rank at most {self._limits.max_lora_rank}, slots that are not sharded by rank",
                got=f"rank {spec.rank}, fully_sharded_loras={self._limits.fully_sharded_loras}",
                remedy="start the engine with another max_lora_rank, or push mode='merged'",
            )
        manager, weights = self._manager, stand_ins(tensors)
        mirrors, targets, stacks = _mirrors(manager.modules)
        recorder = Recorder(weights, targets)
        try:
            with recorder:
                model = self._lora_model(1, weights, spec, "meta")
                manager._create_merged_loras_inplace(model)
                self._require_known(model, tensors)
                for path, mirror in mirrors.items():
                    found = model.get_lora(path)
                    if found is not None:
                        mirror.set_lora(0, found.lora_a, found.lora_b)
        except BridgeError:
            raise
        except LOADER_ERRORS as error:
            raise ShapeMismatch(
                "an adapter's tensors do not fit the engine's slots",
                where="set_lora",
                got=f"{type(error).__name__}: {error}",
                remedy="trainer and engine must run the same configuration",
                names=tuple(weights),
            ) from error
        moved = {move.target for move in recorder.moves}
        zeros = tuple(fill for fill in uncovered_fills(recorder) if fill.target in moved)
        placed = SlotLayout(tuple(recorder.moves), zeros, {path: stacks[path] for path in moved})
        _require_full(placed, targets, tensors, spec)
        return placed

    def _require_known(self, model: LoRAModel, tensors: Sequence[TensorInfo]) -> None:
        """vLLM drops without a word what no layer asks for."""
        unknown = set(model.loras) - set(self._manager.modules)
        if not unknown:
            return
        mapper = self._mapper()
        names = [t.name for t in tensors if parse_fine_tuned_lora_name(_PEFT + t.name, mapper)[0] in unknown]
        raise UnexpectedTensor(
            "the engine has no LoRA layer for a module of this adapter",
            where=", ".join(names[:4]),
            expected="modules that vLLM wrapped at its start",
            got=f"{len(unknown)} modules that it lacks or did not wrap",
            remedy="train other target modules, or push mode='merged'",
            names=tuple(names),
        )


E = TypeVar("E", bound=BridgeError)


def _full(kind: type[E], limit: str, size: int, cache: Any, used: frozenset[int]) -> E:
    ids = [f"{k} ({'pinned' if k in cache.pinned_items else 'in use' if k in used else 'idle'})" for k in cache.order]
    return kind(
        "every adapter slot of the engine is taken",
        where=limit,
        expected="one that is free or idle: one adapter serves while the next is loaded",
        got=f"{size} slots with the adapters {', '.join(ids)}",
        remedy=f"start the engine with a larger {limit}, let their requests finish, or remove one (vLLM's remove_lora)",
    )


def id_of(name: str) -> int:
    """The id that all ranks and the driver give an adapter."""
    return (xxhash.xxh3_64_intdigest(name.encode()) & _ID_BITS) | 1


def lora_request(name: str, adapter_id: int) -> LoRARequest:
    """The path is only for vLLM's assertion that there is one: the adapter is never read from it."""
    return LoRARequest(lora_name=name, lora_int_id=adapter_id, lora_path=f"memory:{name}")


_Stacks = dict[str, tuple[nn.Module, str, int]]


def _mirrors(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, torch.Tensor], _Stacks]:
    """Copies of the LoRA layers whose stacks (tensors with the slots in front) are meta tensors with one slot."""
    mirrors: dict[str, Any] = {}
    targets: dict[str, torch.Tensor] = {}
    stacks: _Stacks = {}
    for path, layer in modules.items():
        mirror = mirrors[path] = copy.copy(layer)
        for name, value in list(vars(layer).items()):
            if not name.endswith("_stacked"):
                continue
            found = value if isinstance(value, (tuple, list)) else (value,)
            made = [torch.empty((1, *t.shape[1:]), dtype=t.dtype, device="meta") for t in found]
            mirror.__dict__[name] = made[0] if isinstance(value, torch.Tensor) else tuple(made)
            for k, tensor in enumerate(made):
                target = f"{path}.{name}.{k}"
                targets[target] = tensor
                stacks[target] = (layer, name, -1 if isinstance(value, torch.Tensor) else k)
    return mirrors, targets, stacks


def _stack(layer: nn.Module, name: str, k: int) -> torch.Tensor:
    value = vars(layer)[name]
    found: torch.Tensor = value if k < 0 else value[k]
    return found


def _region(slot: torch.Tensor, region: Region) -> torch.Tensor:
    return slot.as_strided(region.shape, region.strides, slot.storage_offset() + region.offset)


def _box(slot: torch.Tensor, move: Move, shape: tuple[int, ...]) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """(view of the slot, which part of the tensor it holds) of one move of a rectangle."""
    width = shape[1]
    source, dest = move.source, move.dest
    view = _region(slot, dest)
    sizes = [(n, s, k) for k, (n, s) in enumerate(zip(source.shape, source.strides, strict=True)) if n > 1]
    if len(sizes) == 1 and sizes[0][1] == 1 and sizes[0][0] > width - source.offset % width:
        # whole rows in one run: unfold both sides
        step = dest.strides[sizes[0][2]]
        count = sizes[0][0] // width
        view = slot.as_strided((count, width), (step * width, step), slot.storage_offset() + dest.offset)
        at = source.offset // width
        return view, (slice(at, at + count), slice(0, width))
    tall = next((n for n, s, _ in sizes if s == width and s != 1), 1)
    wide = next((n for n, s, _ in sizes if s == 1 and width != 1), 1)
    strides = {s: dest.strides[k] for _, s, k in sizes}
    view = slot.as_strided((tall, wide), (strides.get(width, 0), strides.get(1, 0)), view.storage_offset())
    row, column = divmod(source.offset, width)
    return view, (slice(row, row + tall), slice(column, column + wide))


def _require_full(
    placed: SlotLayout, targets: Mapping[str, torch.Tensor], tensors: Sequence[TensorInfo], spec: LoraSpec
) -> None:
    """vLLM takes a tensor that is too small for a part of one, and leaves zeros: refuse what does not span a slot."""
    shapes = {info.name: info.shape for info in tensors}
    written: dict[str, int] = {}
    for move in placed.moves:
        written[move.target] = written.get(move.target, 0) + move.dest.numel
    for target, count in written.items():
        slot = targets[target].shape[1:]
        layer, _, _ = placed.stacks[target]
        width = max((n for n in slot), default=0)
        known = getattr(getattr(layer, "base_layer", None), "org_vocab_size", None)
        if count not in {spec.rank * n for n in (*slot, known) if isinstance(n, int) and n not in (0, spec.rank)}:
            names = tuple(dict.fromkeys(m.tensor for m in placed.moves if m.target == target))
            raise ShapeMismatch(
                "an adapter's tensor does not span the engine's slot",
                where=f"{', '.join(names)} -> {target}",
                expected=f"{spec.rank} x {width}",
                got=", ".join(str(list(shapes[name])) for name in names),
                remedy="trainer and engine must run the same configuration",
                names=names,
            )
