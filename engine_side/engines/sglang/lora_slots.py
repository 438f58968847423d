"""Adapters of one SGLang rank, kept in memory: where it would put every element is read off its own loader.

SGLang normalises an adapter's tensors (stacks, repeats, slices) and copies them into the slots of its memory pool. Run
on integers that number the elements, and into a pool of integers, the same code shows where each of them goes, what
it drops without a word, and what of a slot stays zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_registry import LoRARef

from bridge.errors import ConfigError, NotFound, ShapeMismatch, UnexpectedTensor, UnsupportedLora
from bridge.model.dtypes import dtype_name, dtype_of
from bridge.model.lora_format import LoraPair, LoraSpec, names_of, pairs
from bridge.model.manifest import TensorInfo
from engine_side.engines.sglang.fused_modules import Siblings
from engine_side.engines.sglang.slot_regions import Placed, places
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.protocol import LoraView, RankHost

_PEFT = "base_model.model."
_STACKED = ("A_buffer", "B_buffer")
_SINGLE = ("embedding_A_buffer", "embedding_B_buffer", "lm_head_A_buffer", "lm_head_B_buffer")


class Loras:
    """Over one rank's LoRA manager. Used by the scheduler's thread."""

    def __init__(self, host: RankHost, manager: Any, checkpoint: Path | None) -> None:
        self._manager = manager
        self._siblings = Siblings(host, checkpoint)
        self._held: dict[str, Placed] = {}
        self._used: set[str] = set()

    @property
    def names(self) -> dict[str, str]:
        """Name -> SGLang's id of every adapter that is loaded, whoever loaded it."""
        return {ref.lora_name: key for key, ref in self._manager.lora_refs.items()}

    def plan(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> dict[str, str]:
        """Tensor -> dtype of the slot that it goes to. Raises UnexpectedTensor, ShapeMismatch, UnsupportedLora."""
        placed = self._place(tensors, spec)
        buffers = _buffers(self._manager.memory_pool)
        return {view.tensor: dtype_name(buffers[view.buffer].dtype) for view in placed.views}

    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write an adapter into a free slot and pin it there. Raises ConfigError where none is free, or for a name that
        was used."""
        infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]
        placed = self._place(infos, spec)
        self._require_room(name)
        self._used.add(name)
        sent = {_PEFT + n: t.clone() for n, t in tensors.items()}
        sent |= {_PEFT + i.name: torch.zeros(i.shape, dtype=dtype_of(i.dtype)) for i in self._zeros(infos, spec)}
        ref = LoRARef(LoRARef.deterministic_id(name, "weighbridge"), name, "memory", True)
        try:
            answer = self._manager.load_lora_adapter_from_tensors(ref, sent, _config(infos, spec))
            if not answer.success:
                raise ConfigError("SGLang did not take an adapter", where=name, got=str(answer.error_message))
            self._clear_a_slot()
            self._manager.fetch_new_loras({ref.lora_id})
        except BaseException:
            self._manager.unload_lora_adapter(ref)
            raise
        self._held[name] = placed

    def views(self, name: str) -> list[LoraView]:
        """Raises NotFound."""
        placed, key = self._held.get(name), self.names.get(name)
        pool = self._manager.memory_pool
        if placed is None or key not in pool.uid_to_buffer_id:
            raise NotFound("this engine holds no such adapter", where="adapter", got=repr(name))
        return placed.of({n: _rows(buffer[pool.uid_to_buffer_id[key]]) for n, buffer in _buffers(pool).items()})

    def remove(self, name: str) -> None:
        """Unknown names are ignored."""
        key = self.names.get(name)
        self._held.pop(name, None)
        if key is not None:
            self._manager.unload_lora_adapter(self._manager.lora_refs[key])

    # ---- how -----------------------------------------------------------------------------------------------------

    def _require_room(self, name: str) -> None:
        if name in self._used:
            raise ConfigError("an adapter's name was used before", where=name, remedy="load it under another name")
        manager = self._manager
        if manager.num_pinned_loras >= manager.max_loras_per_batch - 1:
            raise ConfigError(
                "every adapter slot of the engine is taken",
                where="max_loras_per_batch",
                expected="a free one: one serves while the next is loaded, and SGLang keeps one for other requests",
                got=f"{manager.max_loras_per_batch} slots, {manager.num_pinned_loras} pinned",
                remedy="start the engine with a larger max_loras_per_batch, or unload an adapter",
            )

    def _clear_a_slot(self) -> None:
        """Zero the slot that SGLang takes next: it leaves there what it does not overwrite. An adapter that is not
        pinned makes room if need be; SGLang brings it back when it is asked for."""
        pool, refs = self._manager.memory_pool, self._manager.lora_refs
        empty = [k for k in range(pool.max_loras_per_batch) if pool.buffer_id_to_uid[k] not in pool.uid_to_buffer_id]
        if empty:
            pool._clear_buffer_slot_for_base(empty[0])
            return
        loose = {uid for uid in pool.uid_to_buffer_id if uid is not None and not (uid in refs and refs[uid].pinned)}
        pool.remove_lora(pool.eviction_policy.select_victim(loose or {None}))

    def _zeros(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> list[TensorInfo]:
        """What an adapter leaves out of a fused layer: SGLang drops or mistakes the rest unless all of it is there."""
        known = {pair.module for pair in pairs(tensors)}
        out: list[TensorInfo] = []
        for pair in pairs(tensors):
            for module, (rows, columns) in self._siblings.of(pair.module).items():
                if module not in known and not pair.embedding:
                    known.add(module)
                    a, b = names_of(module)
                    out.append(TensorInfo(a, pair.a.dtype, (spec.rank, columns)))
                    out.append(TensorInfo(b, pair.b.dtype, (rows, spec.rank)))
        return out

    def _place(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Placed:
        self._require_fit(tensors, spec)
        zeros = self._zeros(tensors, spec)
        total = sum(i.shape[0] * i.shape[1] for i in tensors)
        codes = torch.int32 if total < 2**31 - 1 else torch.int64
        numbered: dict[str, torch.Tensor] = {_PEFT + i.name: torch.zeros(i.shape, dtype=codes) for i in zeros}
        first = 1
        starts: list[int] = []
        for info in tensors:
            count = info.shape[0] * info.shape[1]
            numbered[_PEFT + info.name] = torch.arange(first, first + count, dtype=codes).reshape(info.shape)
            starts.append(first)
            first += count
        pool = self._traced(numbered, [*tensors, *zeros], spec, codes)
        placed = places({n: _rows(b[0]).numpy() for n, b in _buffers(pool).items()}, tensors, starts)
        self._require_landed(placed, tensors)
        return placed

    def _traced(
        self, numbered: Mapping[str, torch.Tensor], tensors: Sequence[TensorInfo], spec: LoraSpec, codes: torch.dtype
    ) -> Any:
        """A pool with one slot of integers, after SGLang's own loader."""
        manager = self._manager
        pool = copy.copy(manager.memory_pool)
        pool.pin_memory_available = False
        for attribute in _STACKED:
            stacks = vars(manager.memory_pool)[attribute]
            vars(pool)[attribute] = {name: [_blank(t, codes) for t in rows] for name, rows in stacks.items()}
        for attribute in _SINGLE:
            single = vars(manager.memory_pool)[attribute]
            vars(pool)[attribute] = {name: _blank(tensor, codes) for name, tensor in single.items()}
        pool.new_embeddings_buffer = {}
        try:
            config = LoRAConfig.from_dict(
                _config(tensors, spec), None, base_vocab_size=manager.base_hf_config.vocab_size
            )
            adapter = LoRAAdapter(
                "weighbridge", config, manager.base_hf_config, manager.load_config, manager.lora_backend,
                base_model=manager.base_model,
            )  # fmt: skip
            adapter.scaling = 1  # as it will be, and an integer
            adapter.initialize_weights_from_tensors(dict(numbered))
            pool.load_lora_weight_to_buffer(
                "weighbridge", 0, adapter, manager.lora_modules, manager.embed_tokens_module, manager.lm_head_module
            )
        except LOADER_ERRORS as error:
            raise ShapeMismatch(
                "an adapter's tensors do not fit the engine's slots",
                where="SGLang's LoRA memory pool",
                got=f"{type(error).__name__}: {error}",
                remedy="trainer and engine must run the same configuration",
                names=tuple(i.name for i in tensors),
            ) from error
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
            wanted = _config((pair.a,), spec)
            if not pool.can_support(LoRAConfig.from_dict(wanted)):
                unknown += [pair.a.name, pair.b.name]
            self._require_shapes(pair, spec)
        if unknown:
            raise self._unexpected(unknown)

    def _require_shapes(self, pair: LoraPair, spec: LoraSpec) -> None:
        """A stack that is right in sum may still be wrong in its parts."""
        shape = self._siblings.shape(pair.module)
        if shape is None:
            return
        rows, columns = (shape[1], shape[0]) if pair.embedding else shape
        for info, wanted in ((pair.a, (spec.rank, columns)), (pair.b, (rows, spec.rank))):
            if info.shape != wanted:
                raise ShapeMismatch(
                    "an adapter's tensor has another shape than the layer it adapts",
                    where=info.name,
                    expected=str(list(wanted)),
                    got=str(list(info.shape)),
                    remedy="trainer and engine must run the same configuration",
                    names=(info.name,),
                )

    def _require_landed(self, placed: Placed, tensors: Sequence[TensorInfo]) -> None:
        landed = {view.tensor for view in placed.views}
        nowhere = [info.name for info in tensors if info.name not in landed]
        if nowhere and self._manager.memory_pool.moe_ep_size == 1:
            raise self._unexpected(nowhere)

    def _unexpected(self, names: Sequence[str]) -> UnexpectedTensor:
        return UnexpectedTensor(
            "the engine has no LoRA slot for a module of this adapter",
            where=", ".join(names[:4]),
            expected=f"modules among lora_target_modules: {', '.join(sorted(self._manager.target_modules))}",
            got=f"{len(names)} tensors of modules that it lacks or did not wrap",
            remedy="start the engine with these target modules, train others, or push mode='merged'",
            names=tuple(names),
        )


def _config(tensors: Sequence[TensorInfo], spec: LoraSpec) -> dict[str, Any]:
    """What SGLang reads in an adapter's folder. Alpha = rank, for the scaling is in B."""
    modules = {(i.name.rpartition(".lora_")[0]).rpartition(".")[2] for i in tensors}
    return {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.rank, "target_modules": sorted(modules)}


def _buffers(pool: Any) -> dict[str, torch.Tensor]:
    """Every buffer of a pool, slots in front."""
    found: dict[str, torch.Tensor] = {}
    for attribute in _STACKED:
        for name, layers in vars(pool)[attribute].items():
            found.update({f"{attribute}.{name}.{k}": tensor for k, tensor in enumerate(layers)})
    for attribute in _SINGLE:
        found.update({f"{attribute}.{name}": tensor for name, tensor in vars(pool)[attribute].items()})
    return found


def _blank(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((1, *like.shape[1:]), dtype=dtype)


def _rows(slot: torch.Tensor) -> torch.Tensor:
    """A slot as a matrix; experts one below the other."""
    return slot.view(-1, slot.shape[-1])
