"""An SGLang plugin for tests without a GPU.

It replaces pinned memory, which SGLang's LoRA half asks for, by ordinary memory; the one Triton kernel that its logits
processor runs on every device (the soft cap of Gemma's logits) by plain torch; and the choice of a way through latent
attention, which knows nothing of the backend `torch_native`, by the absorbed one, the only one that backend can do.
Beside that it lets tests look into, and break, the scheduler processes (`tests.sglang.inside`).
"""

import sys

import torch

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_MAKERS = ("tensor", "zeros", "empty", "arange", "ones", "full")


def register():
    if torch.cuda.is_available():
        return
    # torch builds the set of functions that obey `with torch.device(...)` at its first use: built after the patch it
    # would hold the wrappers, and what is meant for "meta" would land in memory
    torch.utils._device._device_constructors()
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    for name in _MAKERS:
        setattr(torch, name, _without_pinning(getattr(torch, name)))

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_UPDATER}.check_weights", _test_door, HookType.AROUND)
    HookRegistry.register("sglang.kernels.ops.activation.softcap._softcap_logits", _softcap, HookType.REPLACE)
    HookRegistry.register("sglang.srt.model_loader.loader._initialize_model", _absorbed, HookType.AFTER)


def _without_pinning(maker):
    if getattr(maker, "_weighbridge_shim", False):
        return maker

    def made(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        return maker(*args, **kwargs)

    made._weighbridge_shim = True
    return made


def _softcap(logits, cap, output=None):
    out = logits if output is None else output
    values = logits.float()
    return out.copy_(values if cap is None else torch.tanh(values / cap) * cap)


def _absorbed(model, *args, **kwargs):
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    found = sys.modules.get("sglang.srt.models.deepseek_v2")
    if found is not None:
        found.DeepseekV2AttentionMLA.dispatch_attn_forward_method = lambda self, batch: AttnForwardMethod.MLA


def _test_door(original, self, recv_req):
    from tests.sglang import inside

    return inside.door(original, self, recv_req)
