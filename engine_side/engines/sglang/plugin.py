"""The `sglang.srt.plugins` entry point: SGLang calls `register` in the main process and in every scheduler."""

from __future__ import annotations

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_MANAGER = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"


def register() -> None:
    """Hook SGLang's `check_weights`, and refuse update calls that name the bridge's loader.

    `check_weights` reaches every rank through the same socket as pause and flush, in their order, and answers by value;
    requests that are not the bridge's go on to SGLang. In the process where requests come in, its hook leads to the
    frontend.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from engine_side.engines.sglang import frontend, scheduler

    HookRegistry.register(f"{_UPDATER}.check_weights", scheduler.answer_check_weights, HookType.AROUND)
    HookRegistry.register(f"{_UPDATER}.update_weights_from_tensor", scheduler.refuse_update, HookType.AROUND)
    HookRegistry.register(f"{_MANAGER}.check_weights", frontend.answer_check_weights, HookType.AROUND)
