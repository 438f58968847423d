"""Write the adapters that act now as one LoRA in portable form: a pair of plain tensors per module of the checkpoint.

scaling     folded into B, in fp32 or wider, before any cast
several     one pair: A stacked, B side by side
ranks       padded with zeros to the largest
experts     a pair each; a checkpoint tensor that is a block of rows (gate, up) takes those rows of B and all of A
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import NamedTuple

import torch
from torch import nn

from bridge.model.lora_format import names_of
from trainer_side.lora.layers.expert_slices import find_slice
from trainer_side.lora.layers.factors import expert_factors, low_rank, wide_dtype
from trainer_side.lora.layers.module_tree import Wrapper
from trainer_side.lora.layers.read import parameters_of
from trainer_side.lora.layers.values import ActiveLora, LoraParameters, SentValues
from trainer_side.lora.state import LoraState
from trainer_side.names.naming import CanonicalMap
from trainer_side.names.tensor_layout import Computed


@dataclass(frozen=True, eq=False)
class FactorPair:
    """One module of the checkpoint and the part of a live layer's delta that acts on it.

    Attributes:
        module: its checkpoint name.
        layer: the live wrapper.
        rows, columns: which of the logical matrix B A (outputs x inputs).
        flipped: the checkpoint stores the logical matrix the other way round, so A and B change places.
        a, b: shapes and dtypes, on meta: (rank, inputs) and (outputs, rank).
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


@dataclass(frozen=True, eq=False)
class PortableLora:
    """All pairs of a model and their one rank; `unfit`: paths of layers that have no such form."""

    pairs: tuple[FactorPair, ...]
    rank: int
    unfit: tuple[str, ...]


class ActingLayer(NamedTuple):
    """A wrapper whose adapters act now, its reading, and the name of its weight's live tensor."""

    wrapper: Wrapper
    parameters: LoraParameters
    weight: str


def plan_pairs(acting: Sequence[ActingLayer], known: CanonicalMap) -> PortableLora:
    """Cut the acting adapters into pairs. Reads shapes only; once per structure and set of active adapters.

    `known` maps live names without ties to checkpoint tensors.
    """
    by_live: dict[str, list[str]] = {}
    for tensor in known.tensors:
        for live in {piece.live for piece in tensor.pieces}:
            by_live.setdefault(live, []).append(tensor.name)
    # All adapters of a layer together; of expert parameters, per expert.
    ranks = [
        sum(lora.a.shape[0] // int(lora.extra.get("experts", 1)) for lora in one.parameters.loras) for one in acting
    ]
    rank = max(ranks, default=0)
    pairs: list[FactorPair] = []
    unfit: list[str] = []
    for one in acting:
        found = [_pair(known, name, one, rank) for name in by_live.get(one.weight, ())]
        fits = [pair for pair in found if pair is not None]
        if fits and len(fits) == len(found):
            pairs += fits
        else:
            unfit.append(one.wrapper.path)
    return PortableLora(tuple(pairs), rank, tuple(unfit))


def _pair(known: CanonicalMap, name: str, one: ActingLayer, rank: int) -> FactorPair | None:
    module, _, last = name.rpartition(".")
    part = find_slice(known.by_name[name], one.weight, known.live[one.weight].shape)
    if part is None or not module or last != "weight":
        return None
    parameters = one.parameters
    first = parameters.loras[0].extra
    # A layer's own A and B tell which way its inputs go, however it or the checkpoint stores the weight; of a parameter
    # on its own only the checkpoint's orientation is known. PEFT adds B A to a lone expert as it is.
    unswapped = parameters.weight.dim() == 3 and not first.get("swapped") and int(first.get("experts", 1)) > 1
    inputs_first = parameters.transposed or parameters.kind == "embedding" or unswapped
    rows, columns = (part.columns, part.rows) if inputs_first else (part.rows, part.columns)
    flipped = parameters.kind == "parameter" and part.transposed != inputs_first
    outputs, inputs = len(range(*rows.indices(2**62))), len(range(*columns.indices(2**62)))
    if flipped:
        outputs, inputs = inputs, outputs
    dtype = reduce(torch.promote_types, [t.dtype for lora in parameters.loras for t in (lora.a, lora.b)])
    a = torch.empty((rank, inputs), dtype=dtype, device="meta")
    b = torch.empty((outputs, rank), dtype=dtype, device="meta")
    embedding = parameters.kind == "embedding"
    return FactorPair(module, one.wrapper.module, embedding, part.expert, rows, columns, flipped, a, b)


def list_computed(portable: PortableLora, given: SentValues, began: LoraState) -> list[Computed]:
    """List the tensors of the LoRA, A and B of each module in turn; computed in the state `began`."""

    @cache  # each layer is read once per push, for all copying threads: reading twice would do no harm
    def read(layer: nn.Module) -> tuple[ActiveLora, ...]:
        return parameters_of(began.read_chain(layer), type(layer).__name__).loras

    found: list[Computed] = []
    for pair in portable.pairs:
        name_a, name_b = names_of(pair.module, embedding=pair.embedding)
        half = partial(_compute_half, pair, portable.rank, read, given)
        found += [Computed(name_a, pair.a, partial(half, True)), Computed(name_b, pair.b, partial(half, False))]
    return found


@torch.no_grad()
def _compute_half(
    pair: FactorPair,
    rank: int,
    read: Callable[[nn.Module], tuple[ActiveLora, ...]],
    given: SentValues,
    wanted_a: bool,
    _dtype: torch.dtype,
) -> torch.Tensor:
    """Compute A or B of a module, (rank, inputs) or (outputs, rank), in the dtype that scaling is multiplied in.

    The copy into the arena rounds, so the dtype that travels is not needed.
    """
    loras = read(pair.layer)
    wide = wide_dtype([tensor for one in loras for tensor in (one.a, one.b)])
    of_a = wanted_a != pair.flipped  # of a flipped pair A is the transpose of what PEFT calls B
    stacked = []
    for one in loras:
        if "experts" in one.extra:
            a, b = expert_factors(one, pair.expert, wide, given)
        else:
            a, b = low_rank(one, wide, given)
        half = a[:, pair.columns] if of_a else b[pair.rows].T
        stacked.append(half if wanted_a else half * one.scaling)
    whole = torch.cat(stacked)
    if whole.shape[0] < rank:
        whole = torch.cat((whole, whole.new_zeros(rank - whole.shape[0], whole.shape[1])))
    return whole if wanted_a else whole.T.contiguous()
