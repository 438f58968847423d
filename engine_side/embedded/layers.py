"""Tensor-parallel layers, as vLLM has them: fused, sharded, each parameter with its loader.

Shapes: `x` is [tokens, features of this rank]. Weights are [output, input] as in checkpoints until post-load changes
their storage. Each layer owns its `quant_method`, which alone knows how the weight is stored after post-load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bridge.errors import REPORT, ProtocolError
from engine_side.embedded.layouts import CanonicalStorage, LinearMethod, PostLoadLayout
from engine_side.embedded.parallel import Parallel, divide
from engine_side.embedded.weights import (
    Cut,
    Layer,
    default_weight_loader,
    expect_shape,
    load_cuts,
    parameter,
    sharded_parameter,
    write,
)

LoraFactors = tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]
"""Rows [k] that use a LoRA, its A [rank, inputs here] and B [outputs here, rank]."""
VOCAB_ALIGN = 64
"""The vocabulary is padded to a multiple of this, and of the number of ranks."""


def add_to_rows(out: torch.Tensor, rows: torch.Tensor | slice, effect: torch.Tensor) -> None:
    """Add to some rows in place, in the dtype of `effect`, rounding once."""
    out[rows] = (out[rows].to(effect.dtype) + effect).to(out.dtype)


@dataclass(frozen=True)
class LayerContext:
    """Arguments shared by all layers of one rank: dtype of products, tensor-parallel state, post-load layout."""

    dtype: torch.dtype
    tp: Parallel
    layout: PostLoadLayout


class RMSNorm(Layer):
    """Root-mean-square norm over the last dimension, computed in float32 as in transformers."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((size,), dtype, default_weight_loader)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LinearBase(Layer):
    """A linear layer. Subclasses say which part of a checkpoint's tensors this rank holds.

    Args:
        input_cut: this rank's inputs.
        output_cuts: shard id -> where the outputs of a part, which checkpoints hold by itself, lie there and here; the
            parts are stacked in this order. A layer that is not fused has one part, None.
    """

    bias: nn.Parameter | None
    quantizable = True
    """False for layers that a quantised checkpoint keeps as they are."""

    def __init__(self, input_cut: Cut, output_cuts: Mapping[object, Cut], bias: bool, context: LayerContext) -> None:
        super().__init__()
        self.input_cut, self.output_cuts = input_cut, output_cuts
        self.input_size_per_partition = inputs = input_cut.size
        self.output_size_per_partition = outputs = sum(cut.size for cut in output_cuts.values())
        self.params_dtype = dtype = context.dtype
        self.tp = tp = context.tp
        self.quant_method: LinearMethod = context.layout.linear(context.layout.storage)
        self.weight = sharded_parameter((outputs, inputs), dtype, self.weight_loader, tp)
        own_bias = sharded_parameter((outputs,), dtype, self.weight_loader, tp) if bias else None
        self.register_parameter("bias", own_bias)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: object = None) -> None:
        """Write this rank's part of a whole checkpoint tensor: weight, bias, or scales of blocks of the weight.
        Raises ProtocolError, ShapeMismatch, DtypeMismatch."""
        outputs = self.output_cuts.get(shard_id)
        if outputs is None:
            expected = " | ".join(map(repr, self.output_cuts))
            raise ProtocolError(
                "unknown part of a fused layer", where="shard_id", expected=expected, got=repr(shard_id), remedy=REPORT
            )
        load_cuts(param, param.data, loaded, (outputs, self.input_cut)[: param.dim()])

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """Compute this rank's contribution, without collectives."""
        return self.quant_method.apply(self, x, self.bias)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Combine all ranks' contributions; linear in them. *(collective in some subclasses)*"""
        return out

    def lora_factors(self, n: int) -> Iterable[LoraFactors]:
        """Return the LoRAs that a call with n rows would add: none here, a LoRA wrapper has its own. Called by modules
        that use this layer's weight without calling the layer, such as an attention with absorbed projections."""
        return ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(self.local(x))


class ReplicatedLinear(LinearBase):
    """A linear layer whose weight is whole on every rank (MoE routers)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, context: LayerContext) -> None:
        super().__init__(Cut.all_of(inputs), {None: Cut.all_of(outputs)}, bias, context)


class ColumnParallelLinear(LinearBase):
    """A linear layer whose outputs are divided over ranks."""

    def __init__(self, inputs: int, outputs: int, bias: bool, context: LayerContext) -> None:
        cut = Cut.of_rank(outputs, context.tp, "the output size")
        super().__init__(Cut.all_of(inputs), {None: cut}, bias, context)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel weights stacked along the output; `shard_id` is the index of the part."""

    def __init__(self, inputs: int, outputs: Sequence[int], bias: bool, context: LayerContext) -> None:
        cuts: dict[object, Cut] = {}
        for index, size in enumerate(outputs):
            offset = sum(cut.size for cut in cuts.values())
            cuts[index] = Cut.of_rank(size, context.tp, "the output size", offset)
        super().__init__(Cut.all_of(inputs), cuts, bias, context)


class QKVParallelLinear(LinearBase):
    """Query, key and value stacked; `shard_id` is "q", "k" or "v". Key and value heads are replicated where there are
    fewer of them than ranks."""

    def __init__(
        self, inputs: int, head_dim: int, heads: int, kv_heads: int, bias: bool, context: LayerContext
    ) -> None:
        tp = context.tp
        self.heads = divide(heads, tp.size, "the number of attention heads")
        self.kv_heads, replicas = 1, 1
        if kv_heads >= tp.size:
            self.kv_heads = divide(kv_heads, tp.size, "the number of key-value heads")
        else:
            replicas = divide(tp.size, kv_heads, "the number of ranks per key-value head")
        q, kv, whole_kv = self.heads * head_dim, self.kv_heads * head_dim, kv_heads * head_dim
        cuts: dict[object, Cut] = {
            "q": Cut(0, tp.rank * q, q, heads * head_dim),
            "k": Cut(q, tp.rank // replicas * kv, kv, whole_kv),
            "v": Cut(q + kv, tp.rank // replicas * kv, kv, whole_kv),
        }
        super().__init__(Cut.all_of(inputs), cuts, bias, context)


class RowParallelLinear(LinearBase):
    """A linear layer whose inputs are divided over ranks and whose outputs are summed; the bias is whole everywhere and
    added on rank 0 only."""

    def __init__(self, inputs: int, outputs: int, bias: bool, context: LayerContext) -> None:
        cut = Cut.of_rank(inputs, context.tp, "the input size")
        super().__init__(cut, {None: Cut.all_of(outputs)}, bias, context)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, self.bias if self.tp.rank == 0 else None)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(out)


class VocabParallelEmbedding(Layer):
    """An embedding whose rows are divided over ranks, padded with rows of zeros that its loader writes."""

    def __init__(self, vocab: int, size: int, context: LayerContext) -> None:
        super().__init__()
        self.params_dtype = context.dtype
        self.tp = tp = context.tp
        step = math.lcm(VOCAB_ALIGN, tp.size)
        self.num_embeddings = vocab
        self.embedding_dim = size
        self.num_embeddings_padded = math.ceil(vocab / step) * step
        self.num_embeddings_per_partition = rows = self.num_embeddings_padded // tp.size
        self.quant_method = LinearMethod(CanonicalStorage())
        start = tp.rank * rows
        self.vocab_cut = Cut(0, min(start, vocab), max(0, min(vocab - start, rows)), vocab)
        self.weight = sharded_parameter((rows, size), context.dtype, self.weight_loader, tp)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: object = None) -> None:
        """Write this rank's rows of a whole checkpoint tensor, and zeros below. Raises ShapeMismatch."""
        expect_shape(loaded, (self.num_embeddings, self.embedding_dim))
        cut = self.vocab_cut
        if cut.size:
            write(param.data[: cut.size], loaded.narrow(0, cut.start, cut.size))
        if cut.size < self.num_embeddings_per_partition:
            param.data[cut.size :].fill_(0)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """Look up the ids [n] that lie on this rank; rows of the others are zeros."""
        here = x - self.vocab_cut.start
        inside = (here >= 0) & (here < self.num_embeddings_per_partition)
        return nn.functional.embedding(torch.where(inside, here, 0), self.weight) * inside.unsqueeze(-1)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(self.local(x))


class ParallelLMHead(VocabParallelEmbedding):
    """The output projection: hidden states [n, hidden] -> logits [n, vocabulary]. Tied, it shares the embedding's
    Parameter object but keeps a `quant_method` of its own."""

    tied = False

    def __init__(self, vocab: int, size: int, context: LayerContext) -> None:
        super().__init__(vocab, size, context)
        self.quant_method = context.layout.head(context.layout.storage)

    def tie_weights(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's Parameter, which is canonical in every layout. Called once, while the model is built."""
        self.weight = embedding.weight
        self.tied, self._untied_storage = True, self.quant_method.storage
        self.quant_method.storage = CanonicalStorage()

    def untie_weights(self) -> None:
        """Take a Parameter of its own, with the values of the embedding's, through post-load."""
        shared = self.weight
        self.weight = sharded_parameter(tuple(shared.shape), shared.dtype, self.weight_loader, self.tp)
        self.weight.data = shared.detach().clone()
        self.tied, self.quant_method.storage = False, self._untied_storage
        self.quant_method.process_weights_after_loading(self)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, None)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(out, -1)[..., : self.num_embeddings]
