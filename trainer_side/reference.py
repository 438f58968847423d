"""Compute the canary's reference: log-probabilities of fixed prompts under the bound model, which stays as it was."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bridge.errors import ConfigError
from bridge.model import canary
from bridge.model.declared_losses import Rounding
from bridge.model.torch_dtypes import DTYPES, dtype_name
from bridge.protocol.deadline import Deadline
from trainer_side.loss_rounding import rounded_as
from trainer_side.names.policy import policy_in
from trainer_side.shielded.guards import LiveState, LiveTensorReached, ReferenceGuard
from trainer_side.shielded.layer_calls import LayerCalls
from trainer_side.shielded.model_copy import ModelCopier
from trainer_side.shielded.undo import Undo

T = TypeVar("T")

log = logging.getLogger(__name__)

FORWARD_ERRORS = (TypeError, ValueError, AttributeError, RuntimeError, LookupError, AssertionError)
"""What a foreign forward raises: the model's own code runs in it, and so may its hooks."""
_ADVICE = 'push with verify="weights": read-back and probes need no forward of the trainer'
_TRANSPARENT = ("_orig_mod", "module")
"""Wrappers that the forward can go around: a compiled one would compile anew, a data-parallel one would communicate.
An FSDP wrapper cannot be left out, since it gathers the weights."""


def reference_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    copier: type[ModelCopier] = ModelCopier,
    *,
    calls: LayerCalls | None = None,
    deadline: Deadline | None = None,
) -> list[list[float]]:
    """Compute the log-probability (nats, from float32 logits) of token i+1 given tokens 0..i of each prompt.

    One no-grad forward per prompt length, in eval mode, outside autocast, of a shielded copy: the model itself is left
    as it was, bit for bit and object for object. Enters no collective. Blocks for the forward.

    A forward that leads back from the copy to the live model (a closure over it, put on the instance) is replaced by
    that of its class, if the copy with it answers as the live model does.

    Args:
        copier: makes the copy that is called.
        calls: records what some layers are called with.
        deadline: looked at before each operation of the forward.

    Returns len(prompt) - 1 numbers per prompt.

    Raises:
        ConfigError: a model that is not a causal language model (no `logits` of shape [batch, tokens, vocabulary] from
            `model(input_ids=...)`), whose vocabulary is smaller than a token id, whose weights are sharded, or whose
            forward writes to its weights or cannot be called without the live model.
        IntegrityError: the model changed meanwhile.
        DeadlineExceeded: the forward outlasted the deadline.
    """

    def answers(double: nn.Module, copying: ModelCopier) -> list[list[float]]:
        if calls is not None:
            calls.watch(copying)
        return _forward(double, prompts)

    return call_on_copy(model, prompts, answers, copier, deadline=deadline)


CallOnCopy = Callable[[nn.Module, ModelCopier], T]
"""Gets the copy, and what made it and knows which tensor of the copy stands for which live one."""


def call_on_copy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    call: CallOnCopy[T],
    copier: type[ModelCopier] = ModelCopier,
    *,
    deadline: Deadline | None = None,
) -> T:
    """Call a function that runs forwards on a shielded copy of a model, under guards; the model stays as it was.

    Args:
        prompts: what the forwards are about; with them a copy without a closure's forward is compared with the model.
        deadline: looked at before each operation of the forwards.

    Raises ConfigError, IntegrityError and DeadlineExceeded as `reference_logprobs`, and what `call` raises.
    """
    core = _core(model)
    _check_ids(core, prompts)
    before = LiveState(model)
    try:
        try:
            return _guarded(model, core, copier, call, deadline)
        except LiveTensorReached as reached:
            _require_class_forward(model, core, prompts, reached.name, deadline)
            return _guarded(model, core, copier, call, deadline, class_forwards=True)
    except LiveTensorReached as reached:
        raise _leads_back(model, reached.name, "the copy reaches the live model by another way too") from reached
    finally:
        before.require_unchanged()


def rounded_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rounding: Rounding,
    copier: type[ModelCopier] = ModelCopier,
    *,
    deadline: Deadline | None = None,
) -> list[list[float]] | None:
    """Compute what `reference_logprobs` does, with `rounding` in the forward. None for a model in which some of it
    cannot be reached, or whose forward does not bear it: that must not cost the canary. Blocks; raises IntegrityError
    and DeadlineExceeded as it does."""
    try:
        with rounded_as(rounding) as modes:
            scores = reference_logprobs(model, prompts, copier, deadline=deadline)
    except ConfigError as error:
        log.warning("rounding as %s is not possible in %s: %s", rounding, type(model).__name__, error)
        return None
    return scores if all(mode.reached for mode in modes) else None


def _guarded(
    model: nn.Module,
    core: nn.Module,
    copier: type[ModelCopier],
    call: CallOnCopy[T],
    deadline: Deadline | None,
    *,
    class_forwards: bool = False,
) -> T:
    """Make a shielded copy and call a function on it; with `class_forwards` without the forwards that were put on
    instances. Raises LiveTensorReached."""
    copying = copier()  # lives as long as the copy, which may refer to some of it weakly
    double = _core(copying.copy(core))
    if class_forwards:
        for module in double.modules():
            vars(module).pop("forward", None)
    with ReferenceGuard(model, copying.lent, deadline=deadline):
        return call(double, copying)


def _forward(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    scores: list[list[float]] = [[] for _ in prompts]
    with torch.no_grad(), quiet(model):
        for length in sorted({len(prompt) for prompt in prompts if len(prompt) > 1}):
            rows = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
            logits = forward_logits(model, [prompts[k] for k in rows])
            ids = torch.tensor([list(prompts[k]) for k in rows], dtype=torch.long)
            values = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            picked = values.gather(-1, ids[:, 1:].to(values.device).unsqueeze(-1)).squeeze(-1)
            for k, row in zip(rows, picked.tolist(), strict=True):
                scores[k] = row
    return scores


def _require_class_forward(
    model: nn.Module, core: nn.Module, prompts: Sequence[Sequence[int]], reached: str, deadline: Deadline | None
) -> None:
    """Raise ConfigError unless the classes' forwards answer as the live model, which is called for it, does."""
    plain = _guarded(
        model, core, ModelCopier, lambda double, _: _forward(double, prompts), deadline, class_forwards=True
    )
    undo = Undo(core)
    try:
        with ReferenceGuard(model, undo.lent, live=False, deadline=deadline):
            live = _forward(core, prompts)
    finally:
        undo.put_back()
    limit = canary.floor_for(dtype_name(p.dtype) for p in core.parameters() if p.dtype in DTYPES.values())
    apart = max((abs(x - y) for a, b in zip(plain, live, strict=True) for x, y in zip(a, b, strict=True)), default=0.0)
    if not apart <= limit:
        raise _leads_back(model, reached, f"without it the model answers otherwise, by {apart:.3g} nats")


def _leads_back(model: nn.Module, name: str, got: str) -> ConfigError:
    return ConfigError(
        "a forward that was put on the model calls the live model, so a copy of it gives no canary",
        where=f"{type(model).__name__}, at {name}",
        expected="forwards that can be called on a copy",
        got=got,
        remedy=_ADVICE,
    )


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that the model's input embedding has. Raises ConfigError without an embedding."""
    size = _embedding_rows(_speaker(_core(model)))
    if size is None:
        raise ConfigError(
            "the model has no input embedding, so the canary has no prompts",
            where=type(model).__name__,
            expected="a causal language model with get_input_embeddings()",
            got="none",
            remedy=_ADVICE,
        )
    return size


def _core(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that add nothing to its forward."""
    while True:
        inner = next((model._modules[n] for n in _TRANSPARENT if n in model._modules), None)
        if inner is None or len(model._modules) != 1 or model._parameters:
            return model
        model = inner


def _speaker(model: nn.Module) -> nn.Module:
    """Return the policy inside a model that adds to it, else the model."""
    return policy_in(model) or model


def _embedding(model: nn.Module) -> Any:
    find = getattr(model, "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError, AttributeError):
        return find() if callable(find) else None


def _embedding_rows(model: nn.Module) -> int | None:
    embedding = _embedding(model)
    rows, weight = getattr(embedding, "num_embeddings", None), getattr(embedding, "weight", None)
    if isinstance(rows, int):
        return rows
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _check_ids(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    rows = _embedding_rows(_speaker(model))
    highest = max((max(prompt, default=0) for prompt in prompts), default=0)
    lowest = min((min(prompt, default=0) for prompt in prompts), default=0)
    if lowest < 0 or (rows is not None and highest >= rows):
        raise ConfigError(
            "a canary prompt has a token that the model does not know",
            where=type(model).__name__,
            expected=f"ids in 0 .. {rows - 1}" if rows is not None else "ids from 0",
            got=str(highest if lowest >= 0 else lowest),
            remedy="make the prompts for this vocabulary: bridge.model.canary.prompts(vocabulary_size(model))",
        )


def _input_device(model: nn.Module) -> torch.device:
    """Return the device of the input embedding, else of the first parameter: token ids have to lie there."""
    weight = getattr(_embedding(_speaker(model)), "weight", None)
    first = weight if isinstance(weight, torch.Tensor) else next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def forward_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Run one forward over prompts of one length; returns logits [rows, tokens, vocabulary]. Of a model around a policy
    they are its own, where it gives any: it may add to those of the policy. Raises ConfigError for a model that gives
    none."""
    ids = torch.tensor([list(row) for row in rows], dtype=torch.long, device=_input_device(model))
    policy = policy_in(model)
    if policy is not None:
        logits = _logits_around(model, policy, ids)
        if logits is not None:
            return logits
        model = policy
    try:
        logits = getattr(model(input_ids=ids), "logits", None)
    except FORWARD_ERRORS as error:
        raise _not_a_language_model(model, f"{type(error).__name__}: {error}") from error
    if not isinstance(logits, torch.Tensor):
        raise _not_a_language_model(model, "an output without logits")
    if logits.dim() != 3 or tuple(logits.shape[:2]) != tuple(ids.shape) or logits.shape[2] <= int(ids.max()):
        raise _not_a_language_model(model, f"logits of shape {list(logits.shape)} for {list(ids.shape)} token ids")
    return logits


def _logits_around(model: nn.Module, policy: nn.Module, ids: torch.Tensor) -> torch.Tensor | None:
    """Find logits in what a model around a policy answers, under whatever name; None for one that gives none, or cannot
    be called with token ids alone."""
    widths: list[int] = []

    def note(_: nn.Module, __: Any, out: Any) -> None:
        logits = getattr(out, "logits", None)
        if isinstance(logits, torch.Tensor):
            widths.append(logits.shape[-1])

    hook = policy.register_forward_hook(note)
    try:
        out = model(input_ids=ids)
    except FORWARD_ERRORS:
        return None
    finally:
        hook.remove()
    wanted = {(*ids.shape, width) for width in widths}
    held = getattr(out, "logits", None)
    found = [t for t in (held, *tree_leaves(out)) if isinstance(t, torch.Tensor) and tuple(t.shape) in wanted]
    return found[0] if found else None


def _not_a_language_model(model: nn.Module, got: str) -> ConfigError:
    return ConfigError(
        "the bound model gives no canary: it is not a causal language model",
        where=type(model).__name__,
        expected="model(input_ids=...).logits of shape [rows, tokens, vocabulary]",
        got=got,
        remedy=_ADVICE,
    )


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Set eval mode, without autocast; put random states back after."""
    legacy, plain = np.random.get_state(), random.getstate()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with torch.random.fork_rng(devices=devices), contextlib.ExitStack() as stack:
        for kind in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
            # Weights are compared, so the forward runs in their own dtype.
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            # Not `model.eval()`: models override it with more than the flag.
            for module in model.modules():
                module.training = False
            yield
        finally:
            np.random.set_state(legacy)
            random.setstate(plain)
