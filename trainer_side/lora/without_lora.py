"""A second module tree over the same parameters, without adapters: `WithoutLora`."""

from __future__ import annotations

from torch import nn

from bridge.errors import ConfigError
from trainer_side.lora.layers.module_tree import peft_child
from trainer_side.lora.layers.wrapper_chain import is_lora, is_saved, is_token_wrapper, is_tokens, is_tuner
from trainer_side.names.naming import ROOT_WRAPPER
from trainer_side.shielded.model_copy import ModelCopier


class WithoutLora(ModelCopier):
    """Copies the base model as it is without adapters: a copy in which every LoRA wrapper (any chain of `base_layer`),
    `modules_to_save` and token wrapper is replaced by the layer or original module inside, a PEFT model by the model
    inside.

    Its forward is the base model's forward (where adapters are merged, with the tensors as they are). `copy` also
    raises ConfigError for a model that is wrapped by a tuner that is no LoRA.
    """

    def inside(self, module: nn.Module) -> nn.Module:
        """The layer inside any chain of wrappers. Raises ConfigError for a wrapper that cannot be taken off."""
        while True:
            module = super().inside(module)
            children = module._modules
            inner = None
            hop = peft_child(module)
            if is_saved(module):
                inner = children["original_module"]
            elif is_token_wrapper(module):
                inner = children["token_adapter"]
            elif (is_lora(module) or is_tokens(module)) and isinstance(children.get("base_layer"), nn.Module):
                inner = children["base_layer"]
            elif is_tuner(module) and isinstance(children.get("base_layer"), nn.Module):
                raise ConfigError(
                    "the model without its adapters cannot be called: a tuner that is not LoRA",
                    where=type(module).__name__,
                    expected="plain parameters, LoRA layers, modules_to_save and trainable tokens",
                    got=type(module).__name__,
                    remedy="merge it into the model",
                )
            elif hop is not None or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                inner = children.get(hop or ROOT_WRAPPER)
            if inner is None:
                return module
            module = inner
