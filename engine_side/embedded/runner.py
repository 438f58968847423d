"""One rank: the model, its keys and values, and the forwards over them. Runs alike in every rank's process."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bridge.errors import ConfigError, NotFound
from bridge.model.lora_format import LoraLimits
from bridge.protocol.codec import Count, Message
from engine_side.embedded.attention import Step
from engine_side.embedded.config import EngineConfig, Limits, ModelConfig
from engine_side.embedded.decoder import CausalLM, Weights, model_class
from engine_side.embedded.kv import Cached, KVTensors
from engine_side.embedded.layouts import layout_of
from engine_side.embedded.loading import load_checkpoint, load_dummy
from engine_side.embedded.lora.context import NO_LORA
from engine_side.embedded.lora.manager import LoraManager
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.ties import untie
from engine_side.embedded.wrappers import unwrap, wrap_linears

T = TypeVar("T")

_FRAME_TOKENS = 8192
_LOGIT_ROWS = 256


class Batch(Message, tag=True, frozen=True):
    """The new tokens of one step: flat token ids, how many of each sequence, their first positions, block tables; the
    adapter of each sequence ("" is the base model), or none at all where every sequence uses the base model."""

    tokens: tuple[Count, ...]
    counts: tuple[Count, ...]
    starts: tuple[Count, ...]
    tables: tuple[tuple[Count, ...], ...]
    adapters: tuple[str, ...] = ()


class ModelRunner:
    """Built in each rank with the same config. Blocks while weights are read. Raises ConfigError or IntegrityError.

    Methods marked *(collective)* must be called by all ranks together when there are several.
    """

    def __init__(self, config: EngineConfig, tp: Parallel) -> None:
        self.config = config
        self.tp = tp
        self.model_config = ModelConfig.read(config.path)
        self.limits = Limits.of(config, self.model_config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model: nn.Module = self._build()
        self._load(self.causal_lm)
        for module in list(self.model.modules()):
            self.post_load(module)
        if config.wrap_linears:
            wrap_linears(self.model, config.wrap_levels)
        self._kv: KVTensors | None = None
        self.lora: LoraManager | None = None
        if config.max_loras:
            self.lora = self._make_lora()
            self.lora.warm_up(self._warm_up)  # before the ranks meet: collectives are free, each rank warms up alone

    @property
    def causal_lm(self) -> CausalLM:
        """The live root as the class that it is."""
        model = self.model
        if not isinstance(model, CausalLM):
            raise ConfigError("the root module is not a CausalLM", got=type(model).__name__)
        return model

    def _build(self) -> CausalLM:
        cls = model_class(self.model_config.architecture)
        return cls(self.model_config, self.limits.dtype, self.tp, layout_of(self.config.layout)).eval()

    def _load(self, model: CausalLM) -> None:
        if self.config.load == "dummy":
            load_dummy(model)
        else:
            load_checkpoint(model, Path(self.config.path))

    def _make_lora(self) -> LoraManager:
        c = self.config
        return LoraManager(
            self.causal_lm, max_loras=c.max_loras, max_rank=c.max_lora_rank, targets=c.lora_targets, tp=self.tp
        )

    @torch.no_grad()
    def _warm_up(self) -> None:
        self._logprobs([[0]])

    @property
    def lora_limits(self) -> LoraLimits | None:
        """What adapters there is room for; None for an engine that was started without LoRA."""
        return LoraLimits(self.config.max_lora_rank, self.config.max_loras) if self.lora is not None else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self.lora.names) if self.lora is not None else ()

    def drop_lora(self, name: str) -> None:
        """Free its slot. Unknown names are ignored."""
        if self.lora is not None and name in self.lora.names:
            self.lora.remove(name)

    def check_lora(self, name: str | None) -> None:
        """Raises NotFound for the name of an adapter that is not loaded; None, the base model, always is."""
        if name is not None and name not in self.adapters:
            expected = " | ".join(("current", "base", *self.adapters))
            raise NotFound("the engine holds no such adapter", where="adapter", expected=expected, got=repr(name))

    @contextmanager
    def _selected(self, adapters: Sequence[str], counts: Sequence[int]) -> Iterator[None]:
        """Inside, the tokens of each sequence use its adapter. Costs nothing where all use the base model."""
        if not any(adapters):
            yield
            return
        if self.lora is None:
            raise NotFound("an adapter was asked of an engine without LoRA", got=repr(sorted(set(adapters))))
        slots = {name: self.lora.slot(name) if name else NO_LORA for name in adapters}
        rows = torch.tensor([slots[name] for name in adapters]).repeat_interleave(torch.tensor(counts))
        with self.lora.context.select(rows):
            yield

    @contextmanager
    def _narrowed(self, index: torch.Tensor | slice) -> Iterator[None]:
        if self.lora is None:
            yield
            return
        with self.lora.context.narrow(index):
            yield

    @torch.no_grad()
    def untie(self, names: Sequence[str]) -> bool:
        """Give tied tensors of these checkpoint names storage of their own, here and in later skeletons. False, and
        nothing is changed, when one of them cannot be."""
        config = untie(self.causal_lm, names)
        if config is None:
            return False
        self.model_config = config
        return True

    def skeleton(self) -> CausalLM:
        """The same class, config and parallel state on the meta device, unwrapped, before post-load."""
        with torch.device("meta"):
            return self._build()

    def load_weights(self, skeleton: nn.Module, weights: Weights) -> None:
        """The engine's own loader, on a skeleton."""
        if not isinstance(skeleton, CausalLM):
            raise ConfigError("not a skeleton of this engine", got=type(skeleton).__name__)
        skeleton.load_weights(weights)

    @torch.no_grad()
    def post_load(self, module: nn.Module) -> bool:
        """The post-load step of one module, False where it has none. Not idempotent."""
        method = getattr(unwrap(module), "quant_method", None)
        if method is None:
            return False
        method.process_weights_after_loading(unwrap(module))
        return True

    def _make_kv(self, blocks: int) -> KVTensors:
        layers = {m.layer: m.kv_shape for m in self.model.modules() if isinstance(m, Cached)}
        return KVTensors(layers, blocks, self.limits.block_size, self.limits.dtype)

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Run one step over the engine's own KV; logits [sequences, vocabulary] of each last token. *(collective)*"""
        if self._kv is None:
            self._kv = self._make_kv(self.limits.num_blocks)
        step = Step.build(batch.tokens, batch.counts, batch.starts, batch.tables, self._kv)
        last = torch.tensor(batch.counts).cumsum(0) - 1
        with self._selected(batch.adapters, batch.counts):
            hidden = self.causal_lm(step)
            with self._narrowed(last):
                return self.causal_lm.logits(hidden[last])

    def check(self, prompts: Iterable[Sequence[int]]) -> list[list[int]]:
        """The prompts as lists of ints. Raises ConfigError for a prompt that is no sequence of ints, is empty or too
        long, or holds an id outside the vocabulary."""
        vocab, longest = self.model_config.vocab_size, self.limits.max_seq_len
        out: list[list[int]] = []
        for index, prompt in enumerate(_iterate(prompts, "prompts", "a sequence of prompts")):
            where = f"prompt {index}"
            ids = _token_ids(prompt, where)
            if not 0 < len(ids) <= longest:
                expected, got = f"1 to {longest} tokens", str(len(ids))
                raise ConfigError("a prompt's length does not fit", where=where, expected=expected, got=got)
            low, high = min(ids), max(ids)
            if low < 0 or high >= vocab:
                got = str(low if low < 0 else high)
                expected = f"0 to {vocab - 1}"
                raise ConfigError("a token id outside the vocabulary", where=where, expected=expected, got=got)
            out.append(ids)
        return out

    @torch.no_grad()
    def prompt_logprobs(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probability of token i+1 given 0..i, per prompt, on fresh KV that nobody else sees, with this loaded
        adapter (None: the base model). *(collective)* Raises ConfigError for a bad prompt, NotFound."""
        self.check(prompts)
        self.check_lora(adapter)
        answers: list[list[float]] = []
        for group in _groups(prompts):
            with self._selected([adapter or ""], [sum(map(len, group))]):
                answers += self._logprobs(group)
        return answers

    def _logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        size = self.limits.block_size
        tables: list[range] = []
        for prompt in prompts:
            start = tables[-1].stop if tables else 0
            tables.append(range(start, start + -(-len(prompt) // size)))
        tokens = [token for prompt in prompts for token in prompt]
        counts = [len(prompt) for prompt in prompts]
        kv = self._make_kv(tables[-1].stop)
        hidden = self.causal_lm(Step.build(tokens, counts, [0] * len(prompts), tables, kv))
        targets = torch.tensor([*tokens[1:], 0])
        flat: list[float] = []
        for start in range(0, len(tokens), _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            with self._narrowed(rows):
                logits = self.causal_lm.logits(hidden[rows]).float().log_softmax(dim=-1)
            flat += logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1).tolist()
        answers: list[list[float]] = []
        for count in counts:
            answers.append(flat[: count - 1])
            flat = flat[count:]
        return answers


def _iterate(value: Iterable[T], where: str, expected: str) -> Iterable[T]:
    """`value` itself. Raises ConfigError for text, and for what cannot be iterated over."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return value
    raise ConfigError(
        "the engine takes token ids", where=where, expected=expected, got=repr(value)[:80], remedy="tokenize the text"
    )


def _token_ids(prompt: Iterable[int], where: str) -> list[int]:
    try:
        return list(map(operator.index, _iterate(prompt, where, "a sequence of token ids")))
    except TypeError as error:
        raise ConfigError(
            "a token id that is no integer", where=where, expected="a sequence of token ids", got=str(error)
        ) from error


def _groups(prompts: Sequence[Sequence[int]]) -> Iterable[list[Sequence[int]]]:
    """Consecutive prompts whose padded frame stays small."""
    group: list[Sequence[int]] = []
    for prompt in prompts:
        longest = max(len(p) for p in (*group, prompt))
        if group and longest * (len(group) + 1) > _FRAME_TOKENS:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
