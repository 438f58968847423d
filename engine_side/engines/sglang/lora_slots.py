"""Hold LoRAs of one SGLang rank in memory, and find where SGLang's own loader puts every element of them.

SGLang normalises a LoRA's tensors (stacks, repeats, slices) and copies them into the slots of its memory pool. Run on
integers that number the elements, and into a pool of integers, the same code shows where each element goes, which ones
it drops without an error, and which parts of a slot stay zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_registry import LoRARef

from bridge.errors import SAME_MODEL, ConfigError, ShapeMismatch, UnexpectedTensor, UnsupportedLora
from bridge.model.lora_format import LoraSpec, names_of, pairs
from bridge.model.manifest import TensorInfo
from bridge.model.torch_dtypes import dtype_name, dtype_of
from engine_side.engines.common.published_state import lora_misfit, lora_not_loaded
from engine_side.engines.sglang.slot_regions import SglangSlotLayout, read_layout
from engine_side.plan.loader_errors import LOADER_ERRORS, LoaderRaised
from engine_side.plan.trace import stand_ins, trace
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.protocol import LoraView, RankHost

_PEFT = "base_model.model."
_BUFFERS = (
    *("A_buffer", "B_buffer"),  # name -> one per layer
    *("embedding_A_buffer", "embedding_B_buffer", "lm_head_A_buffer", "lm_head_B_buffer"),  # name -> one
)
"""Attributes of SGLang's memory pool."""


class SglangLoraSlots:
    """The slots of one rank's LoRA manager. Used by the scheduler's thread; each method raises before it writes."""

    def __init__(self, host: RankHost, manager: Any, checkpoint: Path | None) -> None:
        self._manager = manager
        self._host, self._checkpoint = host, checkpoint
        self._layouts: dict[str, SglangSlotLayout] = {}
        self._used: set[str] = set()

    @property
    def names(self) -> dict[str, str]:
        """SGLang's id of every loaded LoRA by its name, whoever loaded it."""
        return {ref.lora_name: key for key, ref in self._manager.lora_refs.items()}

    def plan(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> dict[str, str]:
        """Return the dtype of the slot that each tensor goes to. Raises UnexpectedTensor, ShapeMismatch,
        UnsupportedLora."""
        layout = self._trace_layout(tensors, spec)
        buffers = _buffers(self._manager.memory_pool)
        return {region.tensor: dtype_name(buffers[region.buffer].dtype) for region in layout.regions}

    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write a LoRA into a free slot and pin it there. Raises ConfigError if no slot is free or the name was used
        before, and as `plan`."""
        infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]
        layout = self._trace_layout(infos, spec)
        self._require_room(name)
        self._used.add(name)
        sent = {_PEFT + n: t.clone() for n, t in tensors.items()}
        sent |= {_PEFT + i.name: torch.zeros(i.shape, dtype=dtype_of(i.dtype)) for i in self._left_out(infos, spec)}
        ref = LoRARef(LoRARef.deterministic_id(name, "weighbridge"), name, "memory", True)
        try:
            answer = self._manager.load_lora_adapter_from_tensors(ref, sent, _peft_config(infos, spec))
            if not answer.success:
                raise ConfigError(
                    "SGLang rejected an adapter",
                    where=name,
                    expected="success",
                    got=str(answer.error_message),
                    remedy="push mode='merged', or train other target modules",
                )
            self._clear_next_slot()
            self._manager.fetch_new_loras({ref.lora_id})
        except BaseException:
            self._manager.unload_lora_adapter(ref)
            raise
        self._layouts[name] = layout

    def views(self, name: str) -> list[LoraView]:
        """Return views of the slot that holds a LoRA of ours. Raises NotFound."""
        layout, key = self._layouts.get(name), self.names.get(name)
        pool = self._manager.memory_pool
        if layout is None or key not in pool.uid_to_buffer_id:
            raise lora_not_loaded(name)
        return layout.views({n: _rows(buffer[pool.uid_to_buffer_id[key]]) for n, buffer in _buffers(pool).items()})

    def remove(self, name: str) -> None:
        """Unload a LoRA that no request uses; unknown names are ignored."""
        key = self.names.get(name)
        self._layouts.pop(name, None)
        if key is not None:
            self._manager.unload_lora_adapter(self._manager.lora_refs[key])

    # ---- slots ---------------------------------------------------------------------------------------------------

    def _require_room(self, name: str) -> None:
        if name in self._used:
            raise ConfigError(
                "an adapter's name was used before",
                where=name,
                expected="a name that was never used here",
                got=repr(name),
                remedy="load it under another name",
            )
        manager = self._manager
        if manager.num_pinned_loras >= manager.max_loras_per_batch - 1:
            raise ConfigError(
                "every adapter slot of the engine is taken",
                where="max_loras_per_batch",
                expected="a free one: one serves while the next is loaded, and SGLang keeps one for other requests",
                got=f"{manager.max_loras_per_batch} slots, {manager.num_pinned_loras} pinned",
                remedy="start the engine with a larger max_loras_per_batch, or unload an adapter",
            )

    def _clear_next_slot(self) -> None:
        """Zero the slot that SGLang takes next, since SGLang overwrites only a part of it. If no slot is empty, a LoRA
        that is not pinned leaves its slot; SGLang loads it again for its next request."""
        pool, refs = self._manager.memory_pool, self._manager.lora_refs
        empty = [k for k in range(pool.max_loras_per_batch) if pool.buffer_id_to_uid[k] not in pool.uid_to_buffer_id]
        if empty:
            pool._clear_buffer_slot_for_base(empty[0])
            return
        loose = {uid for uid in pool.uid_to_buffer_id if uid is not None and not (uid in refs and refs[uid].pinned)}
        pool.remove_lora(pool.eviction_policy.select_victim(loose or {None}))

    # ---- layout --------------------------------------------------------------------------------------------------

    @cached_property
    def _fused(self) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[str, ...]]]:
        """(outputs, inputs) of each module's weight, and the modules that end in one parameter of the engine with it,
        itself included, as a trace of the engine's own loader shows. Of the checkpoint that the engine was started
        from; nothing if that folder is not at hand."""
        infos = () if self._checkpoint is None else checkpoint_tensors(self._checkpoint)
        matrices = [i for i in infos if len(i.shape) == 2 and i.name.endswith(".weight")]
        shapes = {i.name.removesuffix(".weight"): (i.shape[0], i.shape[1]) for i in matrices}
        landed: dict[str, dict[str, None]] = {}
        with suppress(LoaderRaised):
            for move in trace(self._host, stand_ins(infos)).moves if infos else ():
                module = move.tensor.removesuffix(".weight")
                if module in shapes:
                    landed.setdefault(move.target, {})[module] = None
        return shapes, {name: tuple(names) for names in landed.values() for name in names}

    def _left_out(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> list[TensorInfo]:
        """List the tensors of a fused layer's other modules: SGLang drops, misplaces or refuses a LoRA for a part of it
        (https://github.com/sgl-project/sglang/pull/28199)."""
        shapes, groups = self._fused
        known = {pair.module for pair in pairs(tensors)}
        out: list[TensorInfo] = []
        for pair in pairs(tensors):
            for module in groups.get(pair.module, ()):
                if module not in known and not pair.embedding:
                    known.add(module)
                    (rows, columns), (a, b) = shapes[module], names_of(module)
                    out.append(TensorInfo(a, pair.a.dtype, (spec.rank, columns)))
                    out.append(TensorInfo(b, pair.b.dtype, (rows, spec.rank)))
        return out

    def _trace_layout(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> SglangSlotLayout:
        """Load element numbers with SGLang's own loader and read off where they land. Raises as `plan`."""
        self._require_fit(tensors, spec)
        left_out = self._left_out(tensors, spec)
        counts = [info.shape[0] * info.shape[1] for info in tensors]
        starts = list(accumulate(counts[:-1], initial=1))
        codes = torch.int32 if sum(counts) < 2**31 - 1 else torch.int64
        numbered = {_PEFT + i.name: torch.zeros(i.shape, dtype=codes) for i in left_out}
        for info, first, count in zip(tensors, starts, counts, strict=True):
            numbered[_PEFT + info.name] = torch.arange(first, first + count, dtype=codes).reshape(info.shape)
        pool = self._load_numbers(numbered, [*tensors, *left_out], spec, codes)
        layout = read_layout({n: _rows(b[0]).numpy() for n, b in _buffers(pool).items()}, tensors, starts)
        landed = {region.tensor for region in layout.regions}
        nowhere = [info.name for info in tensors if info.name not in landed]
        if nowhere and self._manager.memory_pool.moe_ep_size == 1:
            raise self._no_slot(nowhere)
        return layout

    def _load_numbers(
        self, numbered: Mapping[str, torch.Tensor], tensors: Sequence[TensorInfo], spec: LoraSpec, codes: torch.dtype
    ) -> Any:
        """Return a copy of the memory pool with one slot of integers, filled by SGLang's own loader."""
        manager = self._manager
        pool = copy.copy(manager.memory_pool)
        pool.pin_memory_available = False
        for attribute in _BUFFERS:
            vars(pool)[attribute] = {
                name: [_blank(t, codes) for t in found] if isinstance(found, list) else _blank(found, codes)
                for name, found in vars(manager.memory_pool)[attribute].items()
            }
        pool.new_embeddings_buffer = {}
        try:
            config = LoRAConfig.from_dict(
                _peft_config(tensors, spec), None, base_vocab_size=manager.base_hf_config.vocab_size
            )
            lora = LoRAAdapter(
                "weighbridge", config, manager.base_hf_config, manager.load_config, manager.lora_backend,
                base_model=manager.base_model,
            )  # fmt: skip
            lora.scaling = 1  # as it will be, and an integer
            lora.initialize_weights_from_tensors(dict(numbered))
            pool.load_lora_weight_to_buffer(
                "weighbridge", 0, lora, manager.lora_modules, manager.embed_tokens_module, manager.lm_head_module
            )
        except LOADER_ERRORS as error:
            raise lora_misfit("SGLang's LoRA memory pool", error, (info.name for info in tensors)) from error
        return pool

    def _require_fit(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> None:
        pool = self._manager.memory_pool
        if spec.rank > pool.max_lora_rank:
            raise UnsupportedLora(
                "the engine's slots cannot hold this adapter",
                where="max_lora_rank",
                expected=f"rank at most {pool.max_lora_rank}",
                got=f"rank {spec.rank}",
                remedy="start the engine with a larger max_lora_rank, or push mode='merged'",
            )
        unknown: list[str] = []
        for pair in pairs(tensors):
            if not pool.can_support(LoRAConfig.from_dict(_peft_config((pair.a,), spec))):
                unknown += [pair.a.name, pair.b.name]
            shape = self._fused[0].get(pair.module)
            if shape is None:
                continue
            # each part: a stack of a fused layer may have the right shape though its parts do not
            rows, columns = (shape[1], shape[0]) if pair.embedding else shape
            for info, wanted in ((pair.a, (spec.rank, columns)), (pair.b, (rows, spec.rank))):
                if info.shape != wanted:
                    raise ShapeMismatch(
                        "an adapter's tensor has another shape than the layer it adapts",
                        where=info.name,
                        expected=str(list(wanted)),
                        got=str(list(info.shape)),
                        remedy=SAME_MODEL,
                        names=(info.name,),
                    )
        if unknown:
            raise self._no_slot(unknown)

    def _no_slot(self, names: Sequence[str]) -> UnexpectedTensor:
        return UnexpectedTensor(
            "the engine has no LoRA slot for a module of this adapter",
            where=", ".join(names[:4]),
            expected=f"modules among lora_target_modules: {', '.join(sorted(self._manager.target_modules))}",
            got=f"{len(names)} tensors of modules that it lacks or did not wrap",
            remedy="start the engine with these target modules, train others, or push mode='merged'",
            names=tuple(names),
        )


def _peft_config(tensors: Sequence[TensorInfo], spec: LoraSpec) -> dict[str, Any]:
    """Make the `adapter_config.json` that SGLang reads. Alpha = rank, since the scaling is in B already."""
    modules = {(i.name.rpartition(".lora_")[0]).rpartition(".")[2] for i in tensors}
    return {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.rank, "target_modules": sorted(modules)}


def _buffers(pool: Any) -> dict[str, torch.Tensor]:
    """Every buffer of a pool, slots in its first dimension."""
    found: dict[str, torch.Tensor] = {}
    for attribute in _BUFFERS:
        for name, value in vars(pool)[attribute].items():
            for k, tensor in enumerate(value if isinstance(value, list) else [value]):
                found[f"{attribute}.{name}.{k}"] = tensor
    return found


def _blank(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((1, *like.shape[1:]), dtype=dtype)


def _rows(slot: torch.Tensor) -> torch.Tensor:
    """A slot as a matrix; experts one below the other."""
    return slot.view(-1, slot.shape[-1])
