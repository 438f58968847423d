"""Map live names (a tensor's name in the trainer's module tree) to canonical names (its name in the checkpoint).

Wrappers (torch.compile, data parallel, FSDP, activation checkpointing) only add segments to names. transformers >= 5
also *stores* some weights otherwise than the checkpoint does: experts fused into 3-D tensors, renamed prefixes,
interleaved stacks. Nothing here knows such a table: transformers' own `revert_weight_conversion` is run once on meta
stand-ins of the live tensors under a `Recorder`, and what comes out says for each checkpoint tensor which regions of
which live tensors it is made of. A push then only copies.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from bridge.errors import ConfigError, IntegrityError
from bridge.model.manifest import TensorInfo
from bridge.model.regions import Move, Region, Routes, dense, follow
from bridge.model.torch_dtypes import dtype_name
from bridge.tracing.recorder import Recorder
from trainer_side.names.policy import policy_in, with_policy_below
from trainer_side.names.tensor_checks import require_initialised, require_module, whole_shape

log = logging.getLogger(__name__)

RESERVED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Segments that only a wrapper puts into a name; no model names a submodule so."""
BASE_HOP = "base_layer"
"""The hop that a LoRA layer (PEFT's, vLLM's, SGLang's) puts in front of the layer it wraps."""
PEFT_ROOT = ("base_model", "model")
"""What a PeftModel puts in front of every name."""
LORA_SEGMENTS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag"}
)
"""Whole segments that PEFT gives to the parameters of a LoRA layer; a submodule may be called `lora_gate`."""
ROOT_WRAPPER = "module"
"""What data-parallel wrappers call the model inside; also an ordinary name for a submodule, so structure decides."""

StateDict = dict[str, torch.Tensor]
Revert = Callable[[nn.Module, StateDict], StateDict]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `source` of the live tensor are elements `dest` of the canonical one.

    Both regions count in the row-major order of their tensor, whatever its strides, and have the same shape.
    """

    live: str
    source: Region
    dest: Region


@dataclass(frozen=True, slots=True)
class CanonicalTensor:
    """One tensor of the checkpoint and the live tensors it is made of; `aliases` and `shared` are those of its
    `TensorInfo`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    aliases: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A parameter or persistent buffer as the model holds it."""

    shape: tuple[int, ...]
    buffer: bool


@dataclass(frozen=True, slots=True)
class LiveEntry:
    """A tensor of the live tree that goes into the checkpoint: name with wrappers and without, what its shape and dtype
    are (values are not read), whether it is a buffer, and an identity that the names of one tied tensor share."""

    raw: str
    clean: str
    tensor: torch.Tensor
    buffer: bool
    identity: Hashable


@dataclass(frozen=True)
class CanonicalMap:
    """The live tensors of one model and the checkpoint that they make up; baked once per bound model by `bake_names`.

    Attributes:
        tensors: in the order of the live tensors.
        live: every live tensor that travels, by clean name; a tie is listed once.
        ties: clean name of a tied live tensor -> the clean name that stands for it in `live`.
        raw: name with wrappers, as the bound model's own `named_parameters` gives it -> clean name.
        ignored: live tensors that the checkpoint does not hold.
        prefixes: what names may lack, each with the dot: that of the model without its head, that of a policy inside.
        beside: names and aliases of tensors that lie beside the policy, which an engine does not serve.
    """

    tensors: tuple[CanonicalTensor, ...]
    live: Mapping[str, LiveTensor]
    ties: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()
    beside: frozenset[str] = frozenset()

    @cached_property
    def by_name(self) -> Mapping[str, CanonicalTensor]:
        """Canonical name or alias -> tensor."""
        return {name: tensor for tensor in self.tensors for name in (tensor.name, *tensor.aliases)}

    @cached_property
    def infos(self) -> tuple[TensorInfo, ...]:
        """List the tensors of a full push of the model."""
        return tuple(
            TensorInfo(t.name, dtype_name(t.dtype, t.name), t.shape, t.aliases, t.shared) for t in self.tensors
        )

    def resolve(self, name: str) -> str | None:
        """Return the clean name of a live tensor, under whatever wrappers it was named, or the canonical name of a
        checkpoint tensor; both may lack the prefix of the model without its head. Ties are not resolved.

        None for a name that is not the model's.
        """
        if name in self.raw:
            return self.raw[name]
        clean = canonical_unbound(name)
        live = (self.live, self.ties, self.ignored)
        for one in dict.fromkeys((name, clean, *(prefix + clean for prefix in self.prefixes))):
            if any(one in names for names in live):
                return one
            if one in self.by_name:
                return self.by_name[one].name
        return None


def canonical_unbound(name: str) -> str:
    """Strip the segments that wrappers put into a name, when no model is bound to look at.

    Reserved segments go wherever they stand, and so does the hop of a LoRA layer; `module` and PEFT's prefix go only
    where they lead, since deeper down they may be submodules' own names.
    """
    segments = [s for s in name.split(".") if s not in RESERVED]
    while len(segments) > 1 and segments[0] == ROOT_WRAPPER:
        segments = segments[1:]
    if len(segments) > len(PEFT_ROOT) and tuple(segments[: len(PEFT_ROOT)]) == PEFT_ROOT:
        segments = segments[len(PEFT_ROOT) :]
    return ".".join([s for s in segments[:-1] if s != BASE_HOP] + segments[-1:])


def is_lora_name(name: str) -> bool:
    """Tell by whole segments whether a name is that of a LoRA layer's own parameter."""
    return not LORA_SEGMENTS.isdisjoint(name.split("."))


def wrapped_child(module: nn.Module, *, root: bool) -> str | None:
    """Return the name of the child that a wrapper wraps; None for a module that is no wrapper."""
    for name in module._modules:
        if name in RESERVED:
            return name
    if ROOT_WRAPPER not in module._modules:
        return None
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return ROOT_WRAPPER
    # A root that holds nothing but one `module` forwards to it: a data-parallel engine of some framework.
    alone = len(module._modules) == 1 and not module._parameters and not module._buffers
    return ROOT_WRAPPER if root and alone else None


def bake_names(model: nn.Module) -> CanonicalMap:
    """Read the names, ties and persistent buffers of a model and how its checkpoint holds them.

    Called once when a model is bound; reads no values, copies nothing, takes milliseconds to a second. Works for any
    module; for a transformers >= 5 model the checkpoint form is the one its `save_pretrained` writes.

    Raises:
        ConfigError: `model` is no module, or has no tensors.
        IntegrityError, naming the tensor: a lazy module before its first forward; transformers computes a checkpoint
            tensor instead of copying it.
    """
    entries = list(_live_tensors(require_module(model)))
    if not entries:
        raise ConfigError(
            "the model has no parameters",
            where="the model given to bind",
            expected="a model with parameters or persistent buffers",
            got=type(model).__name__,
            remedy="bind the model itself",
        )
    root = model
    while (hop := wrapped_child(model, root=True)) is not None:
        model = model.get_submodule(hop)
    policy = policy_in(model)
    known = None if policy is None else _bake_around(root, policy, entries)
    return bake_entries(model, entries) if known is None else known


def _bake_around(root: nn.Module, policy: nn.Module, entries: Sequence[LiveEntry]) -> CanonicalMap | None:
    """Bake the names of a policy as those of its own checkpoint, beside the live names of what is around it."""
    prefix = next(clean for _, clean, module in walk(root) if module is policy)
    inside = [replace(e, clean=e.clean.removeprefix(prefix)) for e in entries if e.clean.startswith(prefix)]
    around = [e for e in entries if not e.clean.startswith(prefix)]
    beside = bake_entries(nn.Module(), around) if around else None
    return with_policy_below(bake_entries(policy, inside), prefix, beside)


def bake_entries(inner: nn.Module, entries: Sequence[LiveEntry]) -> CanonicalMap:
    """Bake the names of tensors that the caller listed; `bake_names` and the LoRA modes call it.

    `inner` is the model without wrappers whose conversion to checkpoint form counts. Raises IntegrityError as
    `bake_names`.
    """
    tensors = {entry.clean: entry for entry in entries}
    # Names that a transformers model leaves out of its checkpoint.
    never_saved = getattr(inner, "_keys_to_ignore_on_save", None) if _is_transformers(inner) else None
    dropped = tensors.keys() & set(never_saved or ())
    # Names that a transformers model declares as tied to another one: save_pretrained leaves those out.
    declared = getattr(inner, "all_tied_weights_keys", None)
    declared = frozenset(map(str, declared)) if isinstance(declared, Mapping) else frozenset()
    ties = _ties({n: e for n, e in tensors.items() if n not in dropped}, declared)
    kept = {n: e.tensor for n, e in tensors.items() if n not in ties and n not in dropped}
    baked = _bake(inner, kept, ties, declared)
    used = {piece.live for tensor in baked for piece in tensor.pieces}
    order = {name: k for k, name in enumerate(kept)}
    baked.sort(key=lambda t: min((order[p.live] for p in t.pieces), default=0))
    base = getattr(inner, "base_model_prefix", None) if _is_transformers(inner) else None
    return CanonicalMap(
        prefixes=(f"{base}.",) if isinstance(base, str) and base in inner._modules else (),
        tensors=tuple(baked),
        live={n: LiveTensor(whole_shape(t), tensors[n].buffer) for n, t in kept.items() if n in used},
        ties={alias: name for alias, name in ties.items() if name in used},
        raw={entry.raw: entry.clean for entry in entries},
        ignored=frozenset(tensors.keys() - used - ties.keys()) | {a for a, n in ties.items() if n not in used},
    )


@dataclass(frozen=True)
class TensorPlace:
    """One place of a tensor in a live model: attribute `name` of `module`. `shared`: other names have it there too, and
    only this place is meant."""

    module: nn.Module
    name: str
    shared: bool = False


def live_places(model: nn.Module, known: CanonicalMap, names: Iterable[str]) -> dict[str, tuple[TensorPlace, ...]]:
    """Find the places in the bound model of what checkpoint tensors of these names, or aliases, are made of. Leaves out
    names that the model does not have, or whose modules were exchanged since it was bound."""
    held = {
        f"{prefix}{name}": (module, name) for prefix, _, module in walk(model) for name, _, _ in own_tensors(module)
    }
    raw = {clean: given for given, clean in known.raw.items()}
    found: dict[str, tuple[TensorPlace, ...]] = {}
    for name in names:
        tied = name in known.ties  # an alias that the conversion renames is looked for where its tensor is kept
        made_of = [name] if tied else [p.live for p in known.by_name[name].pieces] if name in known.by_name else []
        places = [held.get(raw.get(live, live)) for live in made_of]
        if places and all(place is not None for place in places):
            found[name] = tuple(TensorPlace(*place, shared=tied) for place in places if place is not None)
    return found


def _live_tensors(model: nn.Module) -> Iterator[LiveEntry]:
    """List every parameter and persistent buffer, ties included. Raises IntegrityError for a lazy module's."""
    for prefix, clean, module in walk(model):
        for name, tensor, buffer in own_tensors(module):
            require_initialised(prefix + name, tensor)
            yield LiveEntry(prefix + name, clean + name, tensor, buffer, identity_of(clean + name, tensor))


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """List a module's own parameters and persistent buffers: (name, tensor, is it a buffer)."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, False
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer, True


def unsaved_names(model: nn.Module) -> frozenset[str]:
    """List the names, without wrappers, of buffers that no checkpoint holds: what `named_buffers()` gives beside those
    that it does."""
    found = ((clean, module) for _, clean, module in walk(model) if module._non_persistent_buffers_set)
    return frozenset(
        canonical_unbound(clean + name) for clean, module in found for name in module._non_persistent_buffers_set
    )


def walk(
    module: nn.Module, prefix: str = "", clean: str = "", *, root: bool = True
) -> Iterator[tuple[str, str, nn.Module]]:
    """List (prefix with wrappers, prefix without, module) of every module, shared ones under each of their names.

    A wrapper's own hop adds nothing to the clean prefix.
    """
    yield prefix, clean, module
    hop = wrapped_child(module, root=root)
    for name, child in module._modules.items():
        if child is not None:
            below = clean if name == hop else f"{clean}{name}."
            yield from walk(child, f"{prefix}{name}.", below, root=root and name == hop)


def _ties(entries: Mapping[str, LiveEntry], declared: frozenset[str]) -> dict[str, str]:
    """Map each tied name to the name that stands for it: the first that the model does not declare as tied."""
    groups: dict[Hashable, list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.identity, []).append(name)
    ties: dict[str, str] = {}
    for names in groups.values():
        kept = next((n for n in names if n not in declared), sorted(names)[-1])
        ties.update({name: kept for name in names if name != kept})
    return ties


def identity_of(name: Hashable, tensor: torch.Tensor) -> Hashable:
    """Return a key that is equal for two tensors that are the same elements of one storage; `name` for an empty one,
    unless it stands for a partitioned tensor: then the object is the identity."""
    if tensor.numel() == 0:
        return name if whole_shape(tensor) == tuple(tensor.shape) else id(tensor)
    # The stride of a dimension with one element says nothing.
    strides = tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), strides, tensor.dtype


def _is_transformers(model: nn.Module) -> bool:
    """Tell whether a model is transformers' own, without importing transformers for one that is not."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _revert(model: nn.Module) -> Revert | None:
    """transformers' own way back from live tensors to checkpoint tensors; None where live and checkpoint agree."""
    if not _is_transformers(model):
        return None
    try:
        library = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:  # transformers < 5 stores what the checkpoint holds
        return None
    revert: Revert = library.revert_weight_conversion
    return revert


def _bake(
    model: nn.Module, kept: Mapping[str, torch.Tensor], ties: Mapping[str, str], declared: frozenset[str]
) -> list[CanonicalTensor]:
    stand_ins = {n: torch.empty(whole_shape(t), dtype=t.dtype, device="meta") for n, t in kept.items()}
    shared = {alias: name for alias, name in ties.items() if alias not in declared}
    revert = _revert(model)
    if revert is None:
        baked = []
        for name, tensor in stand_ins.items():
            whole = dense(tuple(tensor.shape))
            baked.append(CanonicalTensor(name, tensor.dtype, whole.shape, (Piece(name, whole, whole),)))
        aliases, apart = _by_kept(ties), _by_kept(shared)
    else:
        baked = _traced(revert, model, stand_ins, stand_ins)
        aliases = _traced_aliases(revert, model, stand_ins, baked, ties)
        apart = _traced_aliases(revert, model, stand_ins, baked, shared)
    return [replace(t, aliases=tuple(aliases.get(t.name, ())), shared=tuple(apart.get(t.name, ()))) for t in baked]


def _by_kept(ties: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for alias, name in ties.items():
        found.setdefault(name, []).append(alias)
    return found


def _traced_aliases(
    revert: Revert, model: nn.Module, sources: StateDict, baked: Sequence[CanonicalTensor], ties: Mapping[str, str]
) -> dict[str, list[str]]:
    """Find the checkpoint names that tied live names add, by the checkpoint tensor that has the same elements."""
    by_content = {(t.shape, t.dtype, frozenset(t.pieces)): t.name for t in baked}
    known = {t.name for t in baked}
    tied = {alias: sources[name] for alias, name in ties.items()}
    found: dict[str, list[str]] = {}
    for other in _traced(revert, model, sources, sources | tied) if tied else ():
        same = by_content.get((other.shape, other.dtype, frozenset(other.pieces)))
        if other.name not in known and same is not None:
            found.setdefault(same, []).append(other.name)
    return found


def _traced(revert: Revert, model: nn.Module, sources: StateDict, state: StateDict) -> list[CanonicalTensor]:
    """Run the conversion on stand-ins and trace where each result comes from."""
    with Recorder(sources) as recorder:
        results = revert(model, dict(state))
    baked = []
    for name, tensor in results.items():
        found = recorder.provenance(tensor)
        pieces = tuple(Piece(live, origin, held) for live, held, origin in found.pieces)
        if tensor.numel() == 0 and name in state:  # it has no provenance, and stands for the live tensor of its name
            pieces = (Piece(name, dense(tuple(state[name].shape)), dense(tuple(tensor.shape))),)
        if found.taint is not None or found.fills or not pieces:
            raise IntegrityError(
                "transformers' conversion to checkpoint form computes this tensor instead of copying it",
                where=name,
                expected="every element copied from one live tensor",
                got=found.taint or ("a constant" if found.fills else "an empty tensor without a live one of its name"),
                remedy="push without binding this model, giving checkpoint names and tensors",
                names=(name,),
            )
        baked.append(CanonicalTensor(name, tensor.dtype, tuple(tensor.shape), pieces))
    return baked


# ---- the other way: checkpoint tensors into a module ----------------------------------------------------------------


def routes_into(module: nn.Module) -> Routes:
    """Find where checkpoint tensors go in a module that is attached as an engine: its name conversion, inverted.

    Called on the engine's behalf (`bridge.attach`), once per shape of the module. Besides checkpoint names it takes
    live names, with wrappers and without, which is what an unbound trainer sends; where a name means both, the
    checkpoint's counts. A module whose conversion is not copying takes its live names only.
    """
    live = {entry.clean: (entry.raw, entry.tensor) for entry in _live_tensors(module)}
    routes: dict[str, list[Move]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for clean, (raw, tensor) in live.items():
        whole = dense(tensor.shape)
        for name in (raw, clean):
            shapes[name] = tuple(tensor.shape)
            routes[name] = list(_moves(name, raw, tensor, whole, whole))
    try:
        converted = bake_names(module).tensors if live else ()
    except IntegrityError as error:
        log.warning("%s takes its live names only: %s", type(module).__name__, error)
        converted = ()
    for made in converted:
        for name in (made.name, *made.aliases):
            shapes[name] = made.shape
            routes[name] = [m for p in made.pieces for m in _moves(name, *live[p.live], p.source, p.dest)]
    return Routes(tuple(move for moves in routes.values() for move in moves), shapes)


def _moves(name: str, raw: str, tensor: torch.Tensor, live: Region, sent: Region) -> Iterator[Move]:
    """From elements `sent` of the checkpoint tensor to elements `live`, counted row-major, of a live tensor as it lies
    in its storage."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    if tensor.is_contiguous():
        yield Move(name, sent, raw, live)
        return
    found = follow(live, sent, dense(shape), Region(0, shape, strides))
    if found is None:
        raise IntegrityError(
            "elements of a live tensor share memory in a way that no copy can fill",
            where=raw,
            expected="elements that lie apart",
            got=f"shape {list(shape)}, strides {list(strides)}",
            remedy="attach a module with tensors of its own (.contiguous())",
            names=(raw,),
        )
    for at, of in found.inside:
        yield Move(name, of, raw, at)
