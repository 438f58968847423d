"""The adapters that act now, as one adapter in portable form: a pair of plain tensors per module of the checkpoint.

scaling     folded into B, in fp32 or wider, before any cast
several     one pair: A stacked, B side by side
ranks       padded with zeros to the largest
experts     a pair each; a checkpoint tensor that is a block of rows (gate, up) takes those rows of B and all of A
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from bridge.model.lora_format import names_of
from trainer_side.lora.layers.expert_slices import ExpertSlice, find_slice
from trainer_side.lora.layers.factors import expert_factors, low_rank, wide_dtype
from trainer_side.lora.layers.read import parameters_of
from trainer_side.lora.layers.values import ActiveLora, LoraParameters
from trainer_side.lora.layers.wrapper_chain import read_chain
from trainer_side.lora.state import Watch
from trainer_side.names.naming import CanonicalMap
from trainer_side.names.tensor_layout import Computed

SentValues = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One module of the checkpoint and the part of a live layer's delta that acts on it.

    Attributes:
        module: its checkpoint name.
        layer: the live wrapper.
        rows, columns: which of the logical matrix B A (outputs x inputs).
        flipped: the checkpoint stores the logical matrix the other way round, so A and B change places.
    """

    module: str
    layer: nn.Module
    embedding: bool
    expert: int
    rows: slice
    columns: slice
    flipped: bool
    a: torch.Tensor
    b: torch.Tensor

    @property
    def names(self) -> tuple[str, str]:
        return names_of(self.module, embedding=self.embedding)


@dataclass(frozen=True, eq=False)
class PortableLora:
    """All pairs of a model and their one rank; `unfit`: paths of layers that have no such form."""

    pairs: tuple[LoraPair, ...]
    rank: int
    unfit: tuple[str, ...]


@dataclass(frozen=True)
class Acting:
    """A wrapper whose adapters act now: where it stands, what was read there, the name of its weight's live tensor."""

    path: str
    layer: nn.Module
    parameters: LoraParameters
    weight: str


def plan(acting: Sequence[Acting], known: CanonicalMap) -> PortableLora:
    """Cut the acting adapters into pairs. `known` maps live names without ties to checkpoint tensors.

    Reads shapes only. Once per structure and set of active adapters.
    """
    by_live: dict[str, list[str]] = {}
    for tensor in known.tensors:
        for live in {piece.live for piece in tensor.pieces}:
            by_live.setdefault(live, []).append(tensor.name)
    rank = max((rank_of(one.parameters) for one in acting), default=0)
    pairs: list[LoraPair] = []
    unfit: list[str] = []
    for one in acting:
        found = [_pair(known, name, one, one.parameters, rank) for name in by_live.get(one.weight, ())]
        if not found or any(pair is None for pair in found):
            unfit.append(one.path)
        else:
            pairs += [pair for pair in found if pair is not None]
    return PortableLora(tuple(pairs), rank, tuple(unfit))


def rank_of(parameters: LoraParameters) -> int:
    """The rank of all adapters of a layer together; of expert parameters, per expert."""
    return sum(adapter.a.shape[0] // int(adapter.extra.get("experts", 1)) for adapter in parameters.adapters)


def _pair(known: CanonicalMap, name: str, one: Acting, parameters: LoraParameters, rank: int) -> LoraPair | None:
    segments = name.split(".")
    shape = known.live[one.weight].shape
    grid = find_slice(known.by_name[name], one.weight, shape)
    if grid is None or len(segments) < 2 or segments[-1] != "weight":
        return None
    rows, columns, flipped = _logical(grid, parameters)
    dtype = acting_dtype(parameters.adapters)
    outputs, inputs = len(range(*rows.indices(2**62))), len(range(*columns.indices(2**62)))
    if flipped:
        outputs, inputs = inputs, outputs
    return LoraPair(
        ".".join(segments[:-1]),
        one.layer,
        parameters.kind == "embedding",
        grid.expert,
        rows,
        columns,
        flipped,
        torch.empty((rank, inputs), dtype=dtype, device="meta"),
        torch.empty((outputs, rank), dtype=dtype, device="meta"),
    )


def _logical(grid: ExpertSlice, parameters: LoraParameters) -> tuple[slice, slice, bool]:
    """Rows (outputs), columns (inputs) of B A, and whether the checkpoint's matrix is its transpose.

    A layer's own A and B say which way its inputs go, however it or the checkpoint stores the weight; of a parameter on
    its own only the checkpoint's orientation is known.
    """
    stored_inputs_first = parameters.transposed or parameters.kind == "embedding" or _unswapped(parameters)
    rows, columns = (grid.columns, grid.rows) if stored_inputs_first else (grid.rows, grid.columns)
    flipped = parameters.kind == "parameter" and grid.transposed != stored_inputs_first
    return rows, columns, flipped


def _unswapped(parameters: LoraParameters) -> bool:
    """Whether each expert's matrix is stored (in, out). PEFT adds B A to a lone one as it is."""
    first = parameters.adapters[0].extra
    return parameters.weight.dim() == 3 and not first.get("swapped") and int(first.get("experts", 1)) > 1


def acting_dtype(adapters: Sequence[ActiveLora]) -> torch.dtype:
    """The dtype that holds every one of these adapters' tensors."""
    dtype = adapters[0].a.dtype
    for adapter in adapters:
        dtype = torch.promote_types(dtype, torch.promote_types(adapter.a.dtype, adapter.b.dtype))
    return dtype


class Reader:
    """Reads each layer once per push, in the state that the push began in: neither a merge nor a switch moves A and B,
    so that one reading is all that has to be compared. Used by the copying threads; reading twice would do no harm."""

    def __init__(self, given: SentValues | None, watch: Watch) -> None:
        self.given = given or _live
        self._watch = watch
        self._read: dict[int, LoraParameters] = {}

    def __call__(self, layer: nn.Module) -> LoraParameters:
        found = self._read.get(id(layer))
        if found is None:
            chain = read_chain(layer)
            self._watch.require(chain)
            found = self._read[id(layer)] = parameters_of(chain, type(layer).__name__)
        return found


def _live(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def computed(plan: PortableLora, given: SentValues | None, watch: Watch) -> list[Computed]:
    """The tensors of the adapter, A and B of each module in turn."""
    reader = Reader(given, watch)
    found: list[Computed] = []
    for pair in plan.pairs:
        name_a, name_b = pair.names
        found.append(Computed(name_a, pair.a, partial(_half, pair, plan.rank, reader, True)))
        found.append(Computed(name_b, pair.b, partial(_half, pair, plan.rank, reader, False)))
    return found


@torch.no_grad()
def _half(pair: LoraPair, rank: int, reader: Reader, wanted_a: bool, dtype: torch.dtype) -> torch.Tensor:
    """A or B of a module: (rank, inputs) or (outputs, rank), in the dtype that scaling is multiplied in. `dtype` is not
    needed: the copy rounds."""
    parameters = reader(pair.layer)
    wide = wide_dtype([tensor for one in parameters.adapters for tensor in (one.a, one.b)])
    of_a = wanted_a != pair.flipped  # of a flipped pair A is the transpose of what PEFT calls B
    stacked = []
    for one in parameters.adapters:
        if "experts" in one.extra:
            a, b = expert_factors(one, pair.expert, wide, reader.given)
        else:
            a, b = low_rank(one, wide, reader.given)
        half = a[:, pair.columns] if of_a else b[pair.rows].T
        stacked.append(half if wanted_a else half * one.scaling)
    whole = torch.cat(stacked)
    if whole.shape[0] < rank:
        whole = torch.cat((whole, whole.new_zeros(rank - whole.shape[0], whole.shape[1])))
    return whole if wanted_a else whole.T.contiguous()
