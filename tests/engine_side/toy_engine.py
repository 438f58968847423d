"""A hand-made engine in the manner of vLLM: fused layers with loaders, a post-load step per layer, a tied head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bridge.errors import NotFound, UnsupportedLora
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import Manifest, TensorInfo, lay_out
from bridge.model.torch_dtypes import dtype_name
from engine_side.plan.bake import Baked
from engine_side.protocol import LoraView

Method = Callable[[], Any]


class Plain:
    def post(self, layer: Any) -> None:
        pass

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias)


class Transposed(Plain):
    def post(self, layer: Any) -> None:
        layer.weight.data = layer.weight.data.t().contiguous()
        layer.weight.input_dim, layer.weight.output_dim = layer.weight.output_dim, layer.weight.input_dim

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight.t(), layer.bias)


class Shuffled(Plain):
    """4x2 tiles, in place: not idempotent."""

    def post(self, layer: Any) -> None:
        w = layer.weight.data
        r, c = w.shape
        w.copy_(w.view(r // 4, 4, c // 2, 2).permute(2, 0, 3, 1).reshape(r, c).clone())

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        r, c = layer.weight.shape
        w = layer.weight.view(c // 2, r // 4, 2, 4).permute(1, 3, 0, 2).reshape(r, c)
        return nn.functional.linear(x, w, layer.bias)


class Packed(Plain):
    """The weight vanishes into a closure, what is left is an empty Parameter."""

    def post(self, layer: Any) -> None:
        packed, bias = layer.weight.detach().clone(), layer.bias.detach().double()
        layer.kernel = lambda x: (nn.functional.linear(x, packed).double() + bias).to(x.dtype)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return layer.kernel(x)


class HiddenCopy(Plain):
    """The weight stays, canonical, and nobody reads it."""

    def post(self, layer: Any) -> None:
        layer.copied = layer.weight.detach().clone()

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, layer.copied, layer.bias)


class Latched(Plain):
    """Packs when the kernel is first built, then never again."""

    def __init__(self) -> None:
        self.kernel: Any = None

    def post(self, layer: Any) -> None:
        if self.kernel is None:
            packed = layer.weight.detach() * 2
            self.kernel = lambda x: nn.functional.linear(x, packed) / 2
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x) + layer.bias


class Noted(Plain):
    """The weight is scaled into a tensor of its own, whose address is all that the kernel knows. That memory keeps its
    bytes when the tensor is freed, as memory does that nobody has asked for since."""

    memory: WeakKeyDictionary[nn.Module, list[bytearray]] = WeakKeyDictionary()

    def post(self, layer: Any) -> None:
        scaled = layer.weight.detach() * 2
        memory = bytearray(scaled.nbytes)
        self.memory.setdefault(layer, []).append(memory)
        layer.weight = nn.Parameter(look_at(memory, scaled).copy_(scaled), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        noted = look_at(self.memory[layer][-1], layer.weight)
        return nn.functional.linear(x, noted, layer.bias * 2) / 2


def look_at(memory: bytearray, like: torch.Tensor) -> torch.Tensor:
    """Show what lies in this memory, whoever it belongs to by now."""
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


class Elsewhere(Plain):
    """Keeps what it packed outside the module, once: nothing can reach it."""

    kernels: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()

    def post(self, layer: Any) -> None:
        self.kernels.setdefault(layer, layer.weight.detach().clone())

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.kernels[layer], layer.bias)


def weight(shape: tuple[int, ...], dtype: torch.dtype, loader: Any) -> nn.Parameter:
    param = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    param.weight_loader = loader  # type: ignore[attr-defined]
    param.output_dim = 0  # type: ignore[attr-defined]
    if len(shape) > 1:
        param.input_dim = 1  # type: ignore[attr-defined]
    return param


class Fused(nn.Module):
    """Several checkpoint matrices on top of each other, with biases."""

    def __init__(self, inputs: int, parts: dict[str, int], method: Method, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = parts
        self.method = method()
        self.weight = weight((sum(parts.values()), inputs), dtype, self.load)
        self.bias = weight((sum(parts.values()),), dtype, self.load)

    def load(self, param: nn.Parameter, loaded: torch.Tensor, part: str) -> None:
        start = sum(n for name, n in self.parts.items() if list(self.parts).index(name) < list(self.parts).index(part))
        dest = param.data.narrow(0, start, self.parts[part])
        assert dest.shape == loaded.shape, f"{tuple(dest.shape)} != {tuple(loaded.shape)}"
        dest.copy_(loaded)


class Whole(nn.Module):
    """One tensor as it stands."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight(shape, dtype, self.load)

    def load(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        assert param.shape == loaded.shape, f"{tuple(param.shape)} != {tuple(loaded.shape)}"
        param.data.copy_(loaded)


class Norm(Whole):
    pass


class Table(Whole):
    pass


class Head(Table):
    pass


class Decay(nn.Module):
    """Its loader computes: -exp of what was sent."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.A = weight((size,), dtype, self.load)

    def load(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        param.data.copy_(-torch.exp(loaded.float()))


class Block(nn.Module):
    def __init__(self, hidden: int, method: Method, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv = Fused(hidden, {"q": hidden, "k": 8, "v": 8}, method, dtype)
        self.norm = Norm((hidden,), dtype)
        self.register_buffer("scale", torch.empty(3, dtype=dtype))
        self.register_buffer("derived", torch.empty(3, dtype=dtype), persistent=False)


class Toy(nn.Module):
    def __init__(self, method: Method = Plain, tied: bool = True, decay: bool = False, layers: int = 2) -> None:
        super().__init__()
        dtype, hidden = torch.float32, 16
        self.embed = Table((24, hidden), dtype)
        self.layers = nn.ModuleList(Block(hidden, method, dtype) for _ in range(layers))
        if decay:
            self.decay = Decay(hidden, dtype)
        self.head = Head((24, hidden), dtype)
        if tied:
            self.head.weight = self.embed.weight

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, tensor in weights:
            owner, _, kind = name.rpartition(".")
            parent, _, leaf = owner.rpartition(".")
            if leaf in ("q", "k", "v"):
                param = tensors[f"{parent}.qkv.{kind}"]
                param.weight_loader(param, tensor, leaf)
            elif name.endswith(".scale"):
                tensors[name].copy_(tensor)
            else:
                param = tensors[name]
                param.weight_loader(param, tensor)


class Wrapper(nn.Module):
    """Exposes the base layer's own Parameter objects, as LoRA wrappers do."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name, param in base_layer.named_parameters(recurse=False):
            self.register_parameter(name, param)


class ToyHost:
    """A RankHost over a Toy."""

    rank = 0

    def __init__(self, wrapped: int = 0, seed: int = 0, **options: Any) -> None:
        self.options = options
        self.model = Toy(**options)
        self.post_loads: list[str] = []
        self.skip_post_load = False
        self.load_weights(self.model, weights_of(self.infos, seed).items())
        for block in self.model.layers:
            block.derived.fill_(7)
        for module in list(self.model.modules()):
            self.post_load(module)
        for _ in range(wrapped):
            for block in self.model.layers:
                block.qkv = Wrapper(block.qkv)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return announced(**self.options)

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return Toy(**self.options)

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        skeleton.load_weights(weights)

    def post_load(self, module: nn.Module) -> bool:
        if not isinstance(module, Fused):
            return False
        if not self.skip_post_load:
            self.post_loads.append(type(module.method).__name__)
            module.method.post(module)
        return True

    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(module, Fused):
            return module.method.apply(module, x)
        if isinstance(module, Norm):
            return x * module.weight
        if isinstance(module, Head):
            return x @ module.weight.t()
        if isinstance(module, Table):
            return nn.functional.embedding(x, module.weight)
        raise NotImplementedError

    def prompt_logprobs(self, prompts: Any, adapter: str | None = None) -> list[list[float]]:
        raise NotImplementedError

    def untie(self, names: Any) -> bool:
        return False

    def plan_lora(self, tensors: Any, spec: LoraSpec) -> dict[str, str]:
        raise UnsupportedLora("the toy takes no adapters")

    def load_lora(self, name: str, tensors: Any, spec: LoraSpec) -> None:
        raise UnsupportedLora("the toy takes no adapters")

    def lora_views(self, name: str) -> list[LoraView]:
        raise NotFound("the toy takes no adapters", got=name)

    def remove_lora(self, name: str) -> None:
        pass


def announced(
    method: Method = Plain, tied: bool = True, decay: bool = False, layers: int = 2
) -> tuple[TensorInfo, ...]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (24, 16)}
    for k in range(layers):
        for part, rows in (("q", 16), ("k", 8), ("v", 8)):
            shapes[f"layers.{k}.{part}.weight"] = (rows, 16)
            shapes[f"layers.{k}.{part}.bias"] = (rows,)
        shapes[f"layers.{k}.norm.weight"] = (16,)
        shapes[f"layers.{k}.scale"] = (3,)
    if decay:
        shapes["decay.A"] = (16,)
    if not tied:
        shapes["head.weight"] = (24, 16)
    return tuple(TensorInfo(name, dtype_name(torch.float32), shape) for name, shape in shapes.items())


def weights_of(infos: Iterable[TensorInfo], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i.name: torch.randn(i.shape, generator=generator) for i in infos}


def arena(infos: Iterable[TensorInfo], *seeds: int) -> tuple[Manifest, list[list[torch.Tensor]]]:
    """A manifest and one slot per seed."""
    manifest = lay_out(infos)
    return manifest, [list(weights_of(manifest_infos(manifest), seed).values()) for seed in seeds]


def manifest_infos(manifest: Manifest) -> list[TensorInfo]:
    return [TensorInfo(s.name, s.dtype, s.shape, s.aliases) for s in manifest.tensors]


def checked(baked: Baked) -> Baked:
    """A plan without problems; raises the first one otherwise."""
    if baked.problems:
        raise baked.problems[0]
    return baked
