"""Tensor-parallel layers, as vLLM has them: fused, sharded, each parameter with its loader.

Shapes: `x` is [tokens, features of this rank]. Weights are [output, input] as in checkpoints until post-load says
otherwise. Each layer owns its `quant_method`, which alone knows how the weight is stored after post-load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import nn

from bridge.errors import ProtocolError
from engine_side.embedded.layouts import Layout, LinearMethod
from engine_side.embedded.parallel import Parallel, divide
from engine_side.embedded.weights import (
    Cut,
    block_of,
    default_weight_loader,
    expect_shape,
    parameter,
    write,
    write_cuts,
)

Adapter = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
"""Rows [k] that use an adapter (None: all), its A [rank, inputs here] and B [outputs here, rank]."""
VOCAB_ALIGN = 64
"""The vocabulary is padded to a multiple of this, and of the number of ranks."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in float32 as transformers does it."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter((size,), dtype, default_weight_loader)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LinearBase(nn.Module):
    """A linear layer of [outputs, inputs] elements on this rank; subclasses say how checkpoints are cut."""

    bias: nn.Parameter | None
    quantizable: ClassVar[bool] = True
    """Whether a quantised checkpoint may hold this layer quantised."""
    shard_ids: Sequence[object] = (None,)
    """The parts that checkpoints hold one by one."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, tp: Parallel, layout: Layout) -> None:
        super().__init__()
        self.input_size_per_partition = inputs
        self.output_size_per_partition = outputs
        self.params_dtype = dtype
        self.tp = tp
        self.quant_method: LinearMethod = layout.linear()
        self.weight = parameter(
            (outputs, inputs), dtype, self.weight_loader, input_dim=1, output_dim=0, tp_rank=tp.rank, tp_size=tp.size
        )
        self.register_parameter(
            "bias",
            parameter((outputs,), dtype, self.weight_loader, output_dim=0, tp_rank=tp.rank, tp_size=tp.size)
            if bias
            else None,
        )

    def output_cut(self, shard_id: object) -> Cut:
        """Where the outputs of a part lie in the checkpoint and here. Raises ProtocolError for an unknown part."""
        return Cut.all_of(self.output_size_per_partition)

    def input_cut(self) -> Cut:
        """Which of the inputs are this rank's."""
        return Cut.all_of(self.input_size_per_partition)

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: object = None) -> None:
        """Write this rank's part of a whole checkpoint tensor: weight, bias, or what stands for blocks of the weight.
        Raises ProtocolError, ShapeMismatch, DtypeMismatch."""
        cuts = (self.output_cut(shard_id), self.input_cut())[: param.dim()]
        write_cuts(param.data, loaded, [cut.blocks(n) for cut, n in zip(cuts, block_of(param), strict=False)])

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """What this rank alone contributes, without collectives."""
        return self.quant_method.apply(self, x, self.bias)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """What becomes of all ranks' contributions; linear in them. *(collective, where it is one)*"""
        return out

    def adapters(self, n: int) -> Iterable[Adapter]:
        """The LoRA adapters that a call with n rows would add: none here, a LoRA wrapper has its own. For a module that
        uses this layer's weight without calling the layer, such as an attention with absorbed projections."""
        return ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(self.local(x))


class ReplicatedLinear(LinearBase):
    """The same whole weight on every rank (MoE routers)."""


class ColumnParallelLinear(LinearBase):
    """Outputs are divided over ranks."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, tp: Parallel, layout: Layout) -> None:
        super().__init__(inputs, divide(outputs, tp.size, "the output size"), bias, dtype, tp, layout)
        self.output_size = outputs

    def output_cut(self, shard_id: object) -> Cut:
        size = self.output_size_per_partition
        return Cut(0, self.tp.rank * size, size, self.output_size)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel weights stacked along the output; `shard_id` is the index of the part."""

    def __init__(
        self, inputs: int, outputs: Sequence[int], bias: bool, dtype: torch.dtype, tp: Parallel, layout: Layout
    ) -> None:
        self.output_sizes = tuple(outputs)
        sizes = tuple(divide(size, tp.size, "the output size") for size in outputs)
        self.partition_sizes = sizes
        self.shard_ids = range(len(sizes))
        super().__init__(inputs, sum(sizes), bias, dtype, tp, layout)

    def output_cut(self, shard_id: object) -> Cut:
        if not isinstance(shard_id, int) or not 0 <= shard_id < len(self.output_sizes):
            raise ProtocolError("a merged layer was given no such part", got=repr(shard_id))
        size = self.partition_sizes[shard_id]
        return Cut(sum(self.partition_sizes[:shard_id]), self.tp.rank * size, size, self.output_sizes[shard_id])


class QKVParallelLinear(LinearBase):
    """Query, key and value stacked; `shard_id` is "q", "k" or "v". Key and value heads are replicated where there are
    fewer of them than ranks."""

    def __init__(
        self,
        inputs: int,
        head_dim: int,
        heads: int,
        kv_heads: int,
        bias: bool,
        dtype: torch.dtype,
        tp: Parallel,
        layout: Layout,
    ) -> None:
        self.heads = divide(heads, tp.size, "the number of attention heads")
        if kv_heads >= tp.size:
            self.kv_heads, self.kv_replicas = divide(kv_heads, tp.size, "the number of key-value heads"), 1
        else:
            self.kv_heads, self.kv_replicas = 1, divide(tp.size, kv_heads, "the number of ranks per key-value head")
        q, kv = self.heads * head_dim, self.kv_heads * head_dim
        whole_kv = kv_heads * head_dim
        # shard id -> (offset here, size here, rank of the part here, size in the checkpoint)
        self.parts = {
            "q": (0, q, tp.rank, heads * head_dim),
            "k": (q, kv, tp.rank // self.kv_replicas, whole_kv),
            "v": (q + kv, kv, tp.rank // self.kv_replicas, whole_kv),
        }
        self.split_sizes = [q, kv, kv]
        self.shard_ids = tuple(self.parts)
        super().__init__(inputs, q + 2 * kv, bias, dtype, tp, layout)

    def output_cut(self, shard_id: object) -> Cut:
        if not isinstance(shard_id, str) or shard_id not in self.parts:
            raise ProtocolError("a qkv layer was given no such part", expected="q | k | v", got=repr(shard_id))
        offset, size, index, whole = self.parts[shard_id]
        return Cut(offset, index * size, size, whole)


class RowParallelLinear(LinearBase):
    """Inputs are divided over ranks, outputs are summed; the bias is whole everywhere and added on rank 0 only."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, tp: Parallel, layout: Layout) -> None:
        super().__init__(divide(inputs, tp.size, "the input size"), outputs, bias, dtype, tp, layout)
        self.input_size = inputs

    def input_cut(self) -> Cut:
        size = self.input_size_per_partition
        return Cut(0, self.tp.rank * size, size, self.input_size)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, self.bias if self.tp.rank == 0 else None)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(out)


class VocabParallelEmbedding(nn.Module):
    """Rows of the vocabulary divided over ranks, padded with rows of zeros that its loader writes."""

    def __init__(self, vocab: int, size: int, dtype: torch.dtype, tp: Parallel, layout: Layout) -> None:
        super().__init__()
        step = math.lcm(VOCAB_ALIGN, tp.size)
        padded = math.ceil(vocab / step) * step
        self.num_embeddings = vocab
        self.embedding_dim = size
        self.num_embeddings_padded = padded
        self.num_embeddings_per_partition = padded // tp.size
        self.params_dtype = dtype
        self.tp = tp
        self.quant_method = self._method(layout)
        self.start = tp.rank * self.num_embeddings_per_partition
        self.valid = max(0, min(vocab - self.start, self.num_embeddings_per_partition))
        self.weight = parameter(
            (self.num_embeddings_per_partition, size),
            dtype,
            self.weight_loader,
            input_dim=1,
            output_dim=0,
            tp_rank=tp.rank,
            tp_size=tp.size,
        )

    def _method(self, layout: Layout) -> LinearMethod:
        return layout.embedding()

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: object = None) -> None:
        expect_shape(loaded, (self.num_embeddings, self.embedding_dim))
        if self.valid:
            write(param.data[: self.valid], loaded.narrow(0, self.start, self.valid))
        if self.valid < self.num_embeddings_per_partition:
            param.data[self.valid :].fill_(0)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the ids [n] that lie on this rank, zeros for the others."""
        inside = (x >= self.start) & (x < self.start + self.num_embeddings_per_partition)
        rows = nn.functional.embedding(torch.where(inside, x - self.start, 0), self.weight)
        return rows * inside.unsqueeze(-1)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(self.local(x))


class ParallelLMHead(VocabParallelEmbedding):
    """The output projection: hidden states [n, hidden] -> logits [n, vocabulary]. Tied, it shares the embedding's
    Parameter object but keeps a `quant_method` of its own."""

    tied = False

    def _method(self, layout: Layout) -> LinearMethod:
        return layout.head()

    def tie_weights(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's Parameter. Called once, while the model is built."""
        self.weight = embedding.weight
        self.tied = True

    def local(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x, None)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(out, -1)[..., : self.num_embeddings]
