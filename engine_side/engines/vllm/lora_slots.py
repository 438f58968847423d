"""LoRAs in the memory of one vLLM worker. Their places in vLLM's slots are found by tracing vLLM's own `set_lora`.

vLLM reads adapters from folders; its managers also take one that was made from tensors. Neither a name nor the id
derived from it is ever used twice: vLLM's prefix cache is keyed by the name, its slots by the id.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name

from bridge.errors import SAME_MODEL, BridgeError, ConfigError, ShapeMismatch, UnexpectedTensor, UnsupportedLora
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Fill, Move, Region
from bridge.model.torch_dtypes import dtype_name
from bridge.tracing.recorder import Recorder
from engine_side.engines.common.published_state import lora_misfit, lora_not_loaded
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.plan.trace import stand_ins, uncovered_fills
from engine_side.protocol import LoraView

_PEFT = "base_model.model."
_ID_BITS = (1 << 53) - 1


@dataclass(frozen=True)
class SlotStack:
    """A tensor of a LoRA layer with the slots in front: attribute `name` of `layer`, or item `index` of that tuple."""

    layer: nn.Module
    name: str
    index: int | None

    @property
    def tensor(self) -> torch.Tensor:
        """The live tensor, looked up anew: what the layer computes with now."""
        value = vars(self.layer)[self.name]
        found: torch.Tensor = value if self.index is None else value[self.index]
        return found


@dataclass(frozen=True)
class SlotLayout:
    """The places of a LoRA's tensors in a slot: moves, and zeros around them, into `stacks` by target. `shapes` are
    those of the tensors."""

    moves: tuple[Move, ...]
    zeros: tuple[Fill, ...]
    stacks: Mapping[str, SlotStack]
    shapes: Mapping[str, tuple[int, ...]]


class VllmLoraSlots:
    """The LoRA slots of one worker that was started with `enable_lora=True`. Used by the worker's thread."""

    def __init__(self, worker: Any) -> None:
        self._runner = worker.model_runner
        self._limits = worker.vllm_config.lora_config
        self._vocabulary = int(worker.vllm_config.model_config.get_vocab_size())
        self._loaded: dict[str, SlotLayout] = {}
        self._used: set[str] = set()

    @property
    def names(self) -> dict[str, int]:
        """Name -> id of the LoRAs that the bridge has loaded and vLLM still holds."""
        there = self._manager.list_adapters()
        return {name: id_of(name) for name in self._loaded if id_of(name) in there}

    def request(self, name: str) -> LoRARequest:
        """The LoRARequest for a loaded LoRA. Raises NotFound."""
        self._layout_of(name)
        return lora_request(name)

    def plan(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> dict[str, str]:
        """Find a place for every tensor of a LoRA; writes nothing.

        Returns:
            Tensor -> dtype of the slot that it goes to.

        Raises:
            UnexpectedTensor: vLLM has no LoRA layer for a module.
            ShapeMismatch: a tensor does not fit its slot.
            UnsupportedLora: the rank is too large, or every slot is pinned.
        """
        layout = self._trace(tensors, spec)
        for limit, cache, size in self._caches():  # what is in use now may not be when the LoRA comes; pins stay
            if len(cache) >= size and all(k in cache.pinned_items for k in cache.order):
                raise _full_error(UnsupportedLora, limit, size, cache, frozenset())
        return {move.tensor: dtype_name(layout.stacks[move.target].tensor.dtype) for move in layout.moves}

    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write a LoRA into a free slot and pin it there. Where none is free, the LoRA that was used least recently
        leaves its slot, as vLLM has it.

        Raises:
            ConfigError: all slots are pinned or in use, or the name was used before.
        """
        infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]
        layout = self._trace(infos, spec)
        if name in self._used:
            raise ConfigError(
                "an adapter's name was used before", where="adapter", expected="a name that was never used here",
                got=repr(name), remedy="load it under another name",
            )  # fmt: skip
        self._make_room()
        manager, lora_id = self._manager, id_of(name)
        model = self._lora_model(lora_id, {n: t.clone() for n, t in tensors.items()}, spec, self._runner.device)
        self._used.add(name)
        try:
            manager.add_adapter(model)
            manager.activate_adapter(lora_id)
            manager.pin_adapter(lora_id)
        except BaseException:
            manager.remove_adapter(lora_id)
            raise
        self._loaded[name] = layout

    def views(self, name: str) -> list[LoraView]:
        """Views of the slot of a loaded LoRA, for the read-back. Raises NotFound."""
        layout = self._layout_of(name)
        index = self._manager.lora_index_to_id.index(id_of(name))
        slots = {target: stack.tensor[index] for target, stack in layout.stacks.items()}
        zeros: dict[str, list[torch.Tensor]] = {}
        for fill in layout.zeros:
            zeros.setdefault(fill.target, []).append(_region(slots[fill.target], fill.dest))
        out: list[LoraView] = []
        for move in layout.moves:
            view, part = _rectangle(slots[move.target], move, layout.shapes[move.tensor][1])
            out.append(LoraView(move.tensor, view, part, tuple(zeros.pop(move.target, ()))))
        return out

    def remove(self, name: str) -> None:
        """Drop a LoRA. Unknown names are ignored."""
        if self._loaded.pop(name, None) is not None:
            self._manager.remove_adapter(id_of(name))

    # ---- room ----------------------------------------------------------------------------------------------------

    @property
    def _manager(self) -> Any:
        return self._runner.lora_manager._adapter_manager

    def _layout_of(self, name: str) -> SlotLayout:
        if name not in self.names:
            raise lora_not_loaded(name)
        return self._loaded[name]

    def _make_room(self) -> None:
        manager, used = self._manager, self._in_use()
        for limit, cache, size in self._caches():
            if len(cache) < size:
                continue
            idle = next((k for k in cache.order if k not in cache.pinned_items and k not in used), None)
            if idle is None:
                raise _full_error(ConfigError, limit, size, cache, used)
            if cache is manager._active_adapters:
                manager.deactivate_adapter(idle)
            else:
                manager.remove_adapter(idle)

    def _caches(self) -> tuple[tuple[str, Any, int], ...]:
        """vLLM's argument, its cache and how many it holds: of LoRAs in memory, and of those in slots."""
        manager = self._manager
        return (
            ("max_cpu_loras", manager._registered_adapters, manager.capacity),
            ("max_loras", manager._active_adapters, manager.lora_slots),
        )

    def _in_use(self) -> frozenset[int]:
        """Ids of the LoRAs that requests of this worker ask for, running or kept."""
        state = getattr(self._runner, "lora_state", None)  # of vLLM's model runner V2
        if state is not None:
            found = state.lora_requests.values()
        else:
            found = [request.lora_request for request in self._runner.requests.values()]
        return frozenset(request.lora_int_id for request in found if request is not None)

    # ---- places --------------------------------------------------------------------------------------------------

    def _lora_model(
        self, lora_id: int, tensors: Mapping[str, torch.Tensor], spec: LoraSpec, device: torch.device | str
    ) -> LoRAModel:
        """Make a LoRAModel as vLLM makes one from a folder. `lora_alpha` is the rank, since B holds the scaling."""
        return LoRAModel.from_lora_tensors(
            lora_id,
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

    def _trace(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> SlotLayout:
        """Record vLLM's own `set_lora` on copies of the LoRA layers whose stacks are meta tensors of one slot."""
        if spec.rank > self._limits.max_lora_rank or self._limits.fully_sharded_loras:
            raise UnsupportedLora(
                "the engine's slots cannot hold this adapter",
                where="max_lora_rank, fully_sharded_loras",
                expected=f"rank at most {self._limits.max_lora_rank}, slots that are not sharded by rank",
                got=f"rank {spec.rank}, fully_sharded_loras={self._limits.fully_sharded_loras}",
                remedy="start the engine with another max_lora_rank, or push mode='merged'",
            )
        manager, weights = self._manager, stand_ins(tensors)
        mirrors, targets, stacks = _mirror_layers(manager.modules)
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
            raise lora_misfit("set_lora", error, weights) from error
        moved = {move.target for move in recorder.moves}
        zeros = tuple(fill for fill in uncovered_fills(recorder) if fill.target in moved)
        shapes = {info.name: info.shape for info in tensors}
        layout = SlotLayout(tuple(recorder.moves), zeros, {target: stacks[target] for target in moved}, shapes)
        _require_spanned(layout, spec)
        return layout

    def _require_known(self, model: LoRAModel, tensors: Sequence[TensorInfo]) -> None:
        """Check for tensors that no layer asks for: vLLM drops them without a word."""
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


def _full_error(kind: type[BridgeError], limit: str, size: int, cache: Any, used: frozenset[int]) -> BridgeError:
    ids = [f"{k} ({'pinned' if k in cache.pinned_items else 'in use' if k in used else 'idle'})" for k in cache.order]
    return kind(
        "every adapter slot of the engine is taken",
        where=limit,
        expected="one that is free or idle: one adapter serves while the next is loaded",
        got=f"{size} slots with the adapters {', '.join(ids)}",
        remedy=f"start the engine with a larger {limit}, let their requests finish, or remove one (vLLM's remove_lora)",
    )


def id_of(name: str) -> int:
    """The id of a LoRA, the same in all ranks and in the driver."""
    return (xxhash.xxh3_64_intdigest(name.encode()) & _ID_BITS) | 1


def lora_request(name: str) -> LoRARequest:
    """The LoRARequest for a LoRA in memory. vLLM asserts that there is a path, and never reads it once the id is
    loaded."""
    return LoRARequest(lora_name=name, lora_int_id=id_of(name), lora_path=f"memory:{name}")


def _mirror_layers(
    modules: Mapping[str, nn.Module],
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, SlotStack]]:
    """Copies of the LoRA layers by path; their stacks, meta tensors of one slot, and the live ones, by target."""
    mirrors: dict[str, Any] = {}
    targets: dict[str, torch.Tensor] = {}
    stacks: dict[str, SlotStack] = {}
    for path, layer in modules.items():
        mirror = mirrors[path] = copy.copy(layer)
        for name, value in list(vars(layer).items()):
            if not name.endswith("_stacked"):
                continue
            alone = isinstance(value, torch.Tensor)
            made = [torch.empty((1, *t.shape[1:]), dtype=t.dtype, device="meta") for t in ([value] if alone else value)]
            mirror.__dict__[name] = made[0] if alone else tuple(made)
            for k, tensor in enumerate(made):
                targets[f"{path}.{name}.{k}"] = tensor
                stacks[f"{path}.{name}.{k}"] = SlotStack(layer, name, None if alone else k)
    return mirrors, targets, stacks


def _region(slot: torch.Tensor, region: Region) -> torch.Tensor:
    return slot.as_strided(region.shape, region.strides, slot.storage_offset() + region.offset)


def _rectangle(slot: torch.Tensor, move: Move, width: int) -> tuple[torch.Tensor, tuple[slice, slice]]:
    """The view of a slot into which a move goes, and the rows and columns of the tensor that it holds.

    The first and the last element of the move are corners of a rectangle of the tensor, whose rows are `width` long.
    The dimensions of the move, ordered by their stride in the tensor, are its rows and columns, or whole rows in one
    run.
    """
    source = move.source
    last = source.offset + sum((n - 1) * stride for n, stride in zip(source.shape, source.strides, strict=True))
    top, left = divmod(source.offset, width)
    bottom, right = last // width + 1, last % width + 1
    order = sorted(range(len(source.shape)), key=lambda k: -source.strides[k])
    view = _region(slot, move.dest).permute(order).view(bottom - top, right - left)
    return view, (slice(top, bottom), slice(left, right))


def _require_spanned(layout: SlotLayout, spec: LoraSpec) -> None:
    """Check that every tensor spans its slot: vLLM takes one that is too small for a part of a larger one, and leaves
    zeros."""
    written: dict[str, int] = {}
    for move in layout.moves:
        written[move.target] = written.get(move.target, 0) + move.dest.numel
    for target, count in written.items():
        stack = layout.stacks[target]
        sizes = stack.tensor.shape[1:]
        known = getattr(getattr(stack.layer, "base_layer", None), "org_vocab_size", None)
        if count not in {spec.rank * n for n in (*sizes, known) if isinstance(n, int) and n not in (0, spec.rank)}:
            names = tuple(dict.fromkeys(m.tensor for m in layout.moves if m.target == target))
            raise ShapeMismatch(
                "an adapter's tensor does not span the engine's slot",
                where=f"{', '.join(names)} -> {target}",
                expected=f"{spec.rank} x {max(sizes, default=0)}",
                got=", ".join(str(list(layout.shapes[name])) for name in names),
                remedy=SAME_MODEL,
                names=names,
            )
