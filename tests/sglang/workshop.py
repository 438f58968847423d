"""Real SGLang models built beside the one that a scheduler serves, with wrappers and quantisation that SGLang on CPU
cannot run: loaded by its own loader and by ours, and compared with what concatenation and slices give.

Runs in a scheduler process (`tests.sglang.inside`), where everything that SGLang's layers ask for is set up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.lora.backend.lora_registry import get_backend_from_name
from sglang.srt.lora.layers import get_lora_layer
from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.utils.common import replace_submodule
from torch import nn

from bridge.errors import BridgeError
from bridge.model.levels import RANK_LEVELS
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.torch_dtypes import dtype_name
from engine_side.engines.sglang.host import SglangRankHost
from engine_side.load.loader import Loader
from engine_side.verify.verify import Verifier

Tensors = dict[str, torch.Tensor]


class Model:
    """One of SGLang's model classes with a checkpoint's tensors in it, wrapped as its LoRA manager would. With
    `quantization`, SGLang's word for it, its weights are quantised after they are loaded."""

    def __init__(self, scheduler: Any, folder: str, wrap: Iterable[str] = (), quantization: str | None = None) -> None:
        served = scheduler.tp_worker.model_runner
        self.config = ModelConfig(folder, dtype="bfloat16", quantization=quantization)
        self.load_config = served.load_config
        quant = _get_quantization_config(self.config, self.load_config)
        with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
            self.module: nn.Module = _initialize_model(self.config, self.load_config, quant)
        self.old = dict(load_file(Path(folder, "model.safetensors")))
        self.own(self.old)
        backend = get_backend_from_name("torch_native")(max_loras_per_batch=1, device=torch.device("cpu"))
        wanted = set(wrap)
        for path, layer in list(self.module.named_modules()):
            if path.rpartition(".")[2] in wanted:
                replace_submodule(self.module, path, get_lora_layer(layer, backend))
        runner = SimpleNamespace(
            model=self.module, model_config=self.config, load_config=self.load_config, lora_manager=None
        )
        worker = SimpleNamespace(model_runner=runner)
        self.host = SglangRankHost(SimpleNamespace(tp_worker=worker, tp_group=scheduler.tp_group))
        for module in list(self.module.modules()) if quantization else ():
            self.host.post_load(module)

    def own(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """SGLang's own loader; what it raises, in words."""
        try:
            self.module.load_weights((n, t.clone()) for n, t in tensors.items())
        except Exception as error:  # whatever that loader raises is what the test is about
            return f"{type(error).__name__}: {error}"
        return ""

    def ours(self, tensors: Mapping[str, torch.Tensor], *, partial: bool = False) -> str:
        """Our loader, verified at every level of a rank; what it refuses, in words."""
        infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]
        loader = None
        try:
            loader = Loader(self.host, infos, partial=partial)
            loader.check()
            manifest = lay_out(infos)
            loader.map(manifest, [[tensors[spec.name] for spec in manifest.tensors]])
            verifier = Verifier(loader)
            outcome = loader.apply(0)
            levels = verifier.run(RANK_LEVELS, 0, outcome=outcome)
            bad = [f"{level.level}: {failure}" for level in levels if not level.ok for failure in level.failures]
            return "; ".join(bad)
        except BridgeError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if loader is not None:
                loader.close()

    def tensor(self, path: str) -> torch.Tensor:
        """A live tensor by its path without wrappers."""
        module: nn.Module = self.module
        *parts, name = path.split(".")
        for part in parts:
            module = module.get_submodule(part)
            while isinstance(getattr(module, "base_layer", None), nn.Module):
                module = module.base_layer
        found: torch.Tensor = getattr(module, name)
        return found.detach().clone()


def moved(old: Tensors, seed: int = 5) -> Tensors:
    """Other values of the same shapes."""
    made: Tensors = {}
    for k, (name, tensor) in enumerate(old.items()):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed * 1000 + k))
        made[name] = (tensor.float() + 0.1 * noise).to(tensor.dtype)
    return made


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def experts_below_a_wrapper(scheduler: Any, folder: str) -> dict[str, Any]:
    """SGLang's loader finds no parameter of the wrapped experts' and says nothing."""
    model = Model(scheduler, folder, ["experts"])
    new, layer = moved(model.old), "model.layers.0.mlp.experts"

    def truth(tensors: Tensors) -> dict[str, torch.Tensor]:
        each = [[tensors[f"{layer}.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")] for e in range(8)]
        return {
            "w13_weight": torch.stack([torch.cat(parts[:2]) for parts in each]),
            "w2_weight": torch.stack([parts[2] for parts in each]),
        }

    def holds(tensors: Tensors) -> bool:
        return all(_same(model.tensor(f"{layer}.{name}"), want) for name, want in truth(tensors).items())

    before = holds(model.old)
    said = model.own(new)
    stale = holds(model.old)
    refused = model.ours(new)
    return {"before": before, "own": said, "own stale": stale, "ours": refused, "ours right": holds(new)}


def scales_below_a_wrapper(scheduler: Any, folder: str) -> dict[str, Any]:
    """Block scales have no alias on SGLang's wrapper: its loader updates codes and leaves scales behind."""
    model = Model(scheduler, folder, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    new = moved(model.old)
    layer = "model.layers.0.self_attn"

    def holds(tensors: Tensors, name: str) -> bool:
        parts = [tensors[f"{layer}.{part}_proj.{name}"] for part in "qkv"]
        return _same(model.tensor(f"{layer}.qkv_proj.{name}"), torch.cat(parts))

    names = ("weight", "weight_scale_inv")
    before = [holds(model.old, name) for name in names]
    said = model.own(new)
    own = [holds(new, name) for name in names]
    refused = model.ours(new)
    return {"before": before, "own": said, "own right": own, "ours": refused,
            "ours right": [holds(new, name) for name in names]}  # fmt: skip


def shape_error_in_the_middle(scheduler: Any, folder: str) -> dict[str, Any]:
    """SGLang's loader has written everything before the tensor that does not fit, if it notices."""
    model = Model(scheduler, folder)
    norm, down = (f"model.layers.1.{name}.weight" for name in ("post_attention_layernorm", "mlp.down_proj"))
    good = moved(model.old)
    cut = {name: {**good, name: good[name][..., :-8].contiguous()} for name in (norm, down)}
    start = {name: tensor.detach().clone() for name, tensor in model.module.named_parameters()}

    def changed() -> int:
        live = dict(model.module.named_parameters())
        return sum(not _same(live[name].detach(), start[name]) for name in live)

    refused = [model.ours(cut[name]) for name in (norm, down)]
    untouched = changed() == 0
    raised, after = model.own(cut[norm]), changed()
    model.own(model.old)
    filled = model.own(cut[down])
    return {"bad": [norm, down], "ours": refused, "ours untouched": untouched, "raised": raised,
            "raised changed": after, "filled up": filled, "filled up changed": changed()}  # fmt: skip


def values_for_block_codes(scheduler: Any, folder: str) -> dict[str, Any]:
    """Values pushed into layers of one quantised checkpoint, beside the layers of a checkpoint of these values."""
    live, want = (Model(scheduler, str(Path(folder, name)), ["qkv_proj"]) for name in ("first", "second"))
    values = dict(load_file(Path(folder, "values.safetensors")))

    def differ() -> list[str]:
        made = dict(want.module.named_parameters())
        held = {name: p.detach() for name, p in live.module.named_parameters() if p.dim()}  # no checkpoint has others
        return [name for name, p in held.items() if not _same(p, made[name].detach())]

    before = len(differ())
    refused = live.ours(values)
    part = {name: value for name, value in values.items() if "layers.0.self_attn.q_proj" in name}
    return {"before": before, "ours": refused, "differ": differ(), "part": live.ours(part, partial=True)}


def values_for_layers_that_quantise_them(scheduler: Any, folder: str) -> dict[str, Any]:
    """Values pushed into layers that were quantised after their load, beside fresh ones with these values."""
    live, want = (Model(scheduler, str(Path(folder, name)), quantization="fp8") for name in ("first", "second"))

    def differ() -> list[str]:
        made = {name: p.detach() for name, p in want.module.named_parameters()}
        held = {name: p.detach() for name, p in live.module.named_parameters() if p.dim()}
        return [name for name, p in held.items() if not _same(p, made[name])]

    before, codes = len(differ()), live.tensor("model.layers.0.self_attn.qkv_proj.weight").dtype
    refused = live.ours(want.old)
    return {"before": before, "codes": str(codes), "ours": refused, "differ": differ()}


def recurrent_layers(scheduler: Any, folder: str) -> dict[str, Any]:
    """What SGLang's own load of the same tensors gives, after a load of all, and after one of those alone from which a
    recurrent layer derives something."""
    model = Model(scheduler, folder)
    ends = ("A_log", "dt_bias", "D", "conv1d.weight", "conv.weight")

    def differs(tensors: Tensors) -> list[str]:
        fresh = Model(scheduler, folder)
        said = fresh.own(tensors)
        wanted = _held(fresh.module)
        live = _held(model.module)
        return [said] if said else [name for name, tensor in wanted.items() if not _same(live[name], tensor)]

    before = differs(moved(model.old))
    everything = moved(model.old)
    refused = [model.ours(everything)]
    wrong = [differs(everything)]
    part = {n: t for n, t in moved(everything, 6).items() if n.endswith(tuple(f".{end}" for end in ends))}
    refused.append(model.ours(part, partial=True))
    wrong.append(differs({**everything, **part}))
    return {"before": len(before), "part": len(part), "ours": refused, "ours wrong": wrong}


def _held(module: nn.Module) -> Tensors:
    """Every parameter and buffer, and the plain attributes of every module, by path."""
    attributes = {
        f"{path}.{name}": value
        for path, each in module.named_modules()
        for name, value in vars(each).items()
        if isinstance(value, torch.Tensor)
    }
    return {**attributes, **dict(module.named_parameters()), **dict(module.named_buffers())}


JOBS = {
    each.__name__: each
    for each in (
        experts_below_a_wrapper, scales_below_a_wrapper, shape_error_in_the_middle, values_for_block_codes,
        values_for_layers_that_quantise_them, recurrent_layers,
    )
}  # fmt: skip
