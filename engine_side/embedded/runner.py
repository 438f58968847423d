"""One rank: the model, its first weights, its keys and values, and the forwards over them. Runs alike in every rank's
process."""

from __future__ import annotations

import logging
import operator
import pkgutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bridge.errors import ConfigError, IntegrityError, MissingTensor, NotFound, some_names
from bridge.protocol.codec import Count, ErrorInfo, Message
from engine_side.embedded.attention import CachedAttention, Step
from engine_side.embedded.config import EngineConfig, EngineLimits, ModelConfig
from engine_side.embedded.decoder import CausalLM, Weights, model_class
from engine_side.embedded.kv import KVTensors
from engine_side.embedded.layers import LayerContext, ParallelLMHead
from engine_side.embedded.layouts import POST_LOAD_LAYOUTS
from engine_side.embedded.lora.manager import LoraManager
from engine_side.embedded.lora.slots import NO_LORA
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.wrappers import WrappedLayer, unwrap, wrap_linears

log = logging.getLogger(__name__)

RANK_EXTENSION = "engine_side.engines.embedded:rank_run"
"""Factory of the function that runs an opaque job in a rank: (runner) -> (job) -> None. Imported by name at the first
job, as vLLM's worker extensions are: an engine that nobody syncs needs nothing of the bridge."""
_FRAME_TOKENS = 8192
_DUMMY_SCALE = 1e-3
_LOGIT_ROWS = 256


class SequenceBatch(Message, tag=True, frozen=True):
    """The new tokens of one step: flat token ids, how many of each sequence, their first positions, block tables; the
    LoRA of each sequence ("" is the base model), or none at all where every sequence uses the base model."""

    tokens: tuple[Count, ...]
    counts: tuple[Count, ...]
    starts: tuple[Count, ...]
    tables: tuple[tuple[Count, ...], ...]
    loras: tuple[str, ...] = ()


class ModelRunner:
    """Built in each rank with the same config. Blocks while weights are read. Raises ConfigError or IntegrityError.

    Methods marked *(collective)* must be called by all ranks together when there are several.
    """

    def __init__(self, config: EngineConfig, tp: Parallel) -> None:
        self.config = config
        self.tp = tp
        self.model_config = ModelConfig.read(config.path)
        self.limits = EngineLimits.of(config, self.model_config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model = self._build()
        if config.load == "dummy":
            load_dummy(self.model)
        else:
            load_checkpoint(self.model, Path(config.path))
        for module in list(self.model.modules()):
            self.post_load(module)
        if config.wrap_linears:
            wrap_linears(self.model, config.wrap_levels)
        self._kv: KVTensors | None = None
        self._extension: Callable[[bytes], None] | None = None
        self.lora: LoraManager | None = None
        if config.max_loras:
            self.lora = LoraManager(
                self.model, max_loras=config.max_loras, max_rank=config.max_lora_rank, targets=config.lora_targets
            )
            # Before the ranks meet: collectives are free, each rank warms up alone.
            self.lora.warm_up(lambda: self.prompt_logprobs([[0]]))

    def _build(self) -> CausalLM:
        context = LayerContext(self.limits.dtype, self.tp, POST_LOAD_LAYOUTS[self.config.layout])
        return model_class(self.model_config.architectures[0])(self.model_config, context).eval()

    # ---- weights ----

    @torch.no_grad()
    def untie(self, names: Sequence[str]) -> bool:
        """Give tied tensors of these checkpoint names storage of their own, values and layout as they are, here and in
        later skeletons. False, and nothing is changed, when one of them is neither an end of the tie nor a parameter
        that has its storage for itself."""
        model = self.model
        head, embedding = unwrap(model.lm_head), unwrap(model.model.embed_tokens)
        if not isinstance(head, ParallelLMHead):
            return False
        held = dict(model.named_parameters(remove_duplicate=False))
        for name in names:
            param = held.get(model.resolve(name)[0])
            if param is None or (param is not embedding.weight and _shared(model, param)):
                return False
        if head.tied:
            head.untie_weights()
            for module in model.lm_head.modules():  # the wrappers down to the layer
                if isinstance(module, WrappedLayer):
                    module.mirror()
            model.config = self.model_config = replace(model.config, tie_word_embeddings=False)
        return True

    def skeleton(self) -> CausalLM:
        """Build the same class, config and parallel state on the meta device, unwrapped, before post-load."""
        with torch.device("meta"):
            return self._build()

    def load_weights(self, skeleton: nn.Module, weights: Weights) -> None:
        """Run the engine's own loader on a skeleton. Raises what the loader raises."""
        if not isinstance(skeleton, CausalLM):
            raise ConfigError(
                "not a skeleton of this engine",
                where="load_weights",
                expected="what skeleton() returns",
                got=type(skeleton).__name__,
                remedy="use skeleton()",
            )
        skeleton.load_weights(weights)

    @torch.no_grad()
    def post_load(self, module: nn.Module) -> bool:
        """Run the post-load step of one module, False where it has none. Not idempotent."""
        core = unwrap(module)
        method = getattr(core, "quant_method", None)
        if method is None:
            return False
        method.process_weights_after_loading(core)
        return True

    # ---- LoRA ----

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the loaded LoRAs."""
        return () if self.lora is None else self.lora.names

    def check_lora(self, name: str | None) -> None:
        """Raise NotFound for the name of a LoRA that is not loaded; None, the base model, always is."""
        if name is not None and name not in self.loras:
            expected = " | ".join(("current", "base", *self.loras))
            remedy = "ask for one of these, or push it first"
            raise NotFound(
                "the engine holds no such LoRA", where="adapter", expected=expected, got=repr(name), remedy=remedy
            )

    def drop_lora(self, name: str) -> None:
        """Free the slot of a LoRA. Unknown names are ignored."""
        if self.lora is not None:
            self.lora.remove(name)

    def _selected(self, loras: Sequence[str], counts: Sequence[int]) -> AbstractContextManager[None]:
        """Have the tokens of each sequence use its LoRA inside the block. Costs nothing where all use the base."""
        if self.lora is None or not any(loras):
            return nullcontext()
        slots = [self.lora.slot(name) if name else NO_LORA for name in loras]
        return self.lora.context.select(torch.tensor(slots).repeat_interleave(torch.tensor(counts)))

    def _narrowed(self, index: torch.Tensor | slice) -> AbstractContextManager[None]:
        return nullcontext() if self.lora is None else self.lora.context.narrow(index)

    # ---- forwards ----

    def _make_kv(self, blocks: int) -> KVTensors:
        layers = {m.layer: m.kv_shapes for m in self.model.modules() if isinstance(m, CachedAttention)}
        return KVTensors(layers, blocks, self.limits.block_size, self.limits.kv_dtype)

    @torch.no_grad()
    def forward(self, batch: SequenceBatch) -> torch.Tensor:
        """Run one step over the engine's own KV; logits [sequences, vocabulary] of each last token. *(collective)*"""
        if self._kv is None:
            self._kv = self._make_kv(self.limits.num_blocks)
        step = Step.build(batch.tokens, batch.counts, batch.starts, batch.tables, self._kv)
        last = torch.tensor(batch.counts).cumsum(0) - 1
        with self._selected(batch.loras, batch.counts):
            hidden = self.model(step)
            with self._narrowed(last):
                return self.model.logits(hidden[last])

    def check(self, prompts: Iterable[Sequence[int]]) -> list[list[int]]:
        """Return the prompts as lists of ints. Raises ConfigError for a prompt that is no sequence of ints, is empty or
        too long, or holds an id outside the vocabulary: rank 0 checks before the other ranks are told."""
        vocab, longest = self.model_config.vocab_size, self.limits.max_seq_len
        out: list[list[int]] = []
        where, expected = "prompts", f"sequences of 1 to {longest} token ids from 0 to {vocab - 1}"
        remedy = "tokenise text with the served model's tokenizer; shorten prompts, or start with a larger max_seq_len"
        try:
            for index, prompt in enumerate(prompts):
                where = f"prompt {index}"
                if isinstance(prompt, bytes):  # its items are integers
                    raise TypeError("bytes")
                ids = list(map(operator.index, prompt))
                if not 0 < len(ids) <= longest:
                    raise ValueError(f"a length of {len(ids)} tokens")
                wrong = [token for token in (min(ids), max(ids)) if not 0 <= token < vocab]
                if wrong:
                    raise ValueError(f"token id {wrong[0]}")
                out.append(ids)
        except (TypeError, ValueError) as error:
            what = "the engine cannot take this prompt"
            raise ConfigError(what, where=where, expected=expected, got=str(error), remedy=remedy) from error
        return out

    @torch.no_grad()
    def prompt_logprobs(self, prompts: Sequence[Sequence[int]], lora: str | None = None) -> list[list[float]]:
        """Compute the log-probability of token i+1 given 0..i, per prompt, on fresh KV that nothing else uses, with
        this loaded LoRA (None: the base model). *(collective)* Raises ConfigError for a bad prompt, NotFound."""
        self.check(prompts)
        self.check_lora(lora)
        answers: list[list[float]] = []
        for group in _groups(prompts):
            with self._selected([lora or ""], [sum(map(len, group))]):
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
        hidden = self.model(Step.build(tokens, counts, [0] * len(prompts), tables, kv))
        targets = torch.tensor([*tokens[1:], 0])
        scores: list[torch.Tensor] = []
        for start in range(0, len(tokens), _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            with self._narrowed(rows):
                logits = self.model.logits(hidden[rows]).float().log_softmax(dim=-1)
            scores.append(logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1))
        return [of_prompt[:-1].tolist() for of_prompt in torch.split(torch.cat(scores), counts)]

    # ---- jobs ----

    def attempt(self, job: bytes) -> ErrorInfo | None:
        """Run one opaque job through `RANK_EXTENSION`. Errors come back as data: raising here would leave the other
        ranks out of step. *(collective, as far as the job is)*"""
        try:
            if self._extension is None:
                self._extension = pkgutil.resolve_name(RANK_EXTENSION)(self)
            self._extension(job)
        except Exception as error:
            log.debug("a job failed in rank %d", self.tp.rank, exc_info=True)
            return ErrorInfo.of(error)
        return None


def checkpoint_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, CPU tensor) of every tensor in the folder's safetensors files, one at a time. Raises NotFound, or
    ConfigError without safetensors."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ConfigError(
            "reading a checkpoint needs safetensors",
            where="this environment",
            expected="the extra `hf`",
            got=str(error),
            remedy="pip install 'weighbridge[hf]'",
        ) from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "save it with save_pretrained, or start with load='dummy'"
        raise NotFound(
            "no safetensors in the checkpoint folder",
            where=str(folder),
            expected="*.safetensors",
            got="none",
            remedy=remedy,
        )
    for path in files:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def load_checkpoint(model: CausalLM, folder: Path) -> None:
    """Fill `model` from `folder`. Raises MissingTensor, naming the tensors that the checkpoint lacks, and the errors of
    `load_weights`, with the folder in front."""
    try:
        loaded = model.load_weights(checkpoint_weights(folder))
    except IntegrityError as error:
        raise error.amended(where=f"{folder}: {error.where}") from error
    missing = tuple(name for name in model.checkpoint_names() if name not in loaded)
    if missing:
        raise MissingTensor(
            "the checkpoint lacks tensors of its own architecture",
            where=str(folder),
            expected=some_names(missing),
            got=f"{len(missing)} missing",
            remedy="save the checkpoint again with save_pretrained, or download it anew",
            names=missing,
        )


@torch.no_grad()
def load_dummy(model: nn.Module) -> None:
    """Fill `model` with small uniform noise, the same for the same parameter path on every start."""
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.empty(param.shape, dtype=torch.float32).uniform_(-1.0, 1.0, generator=generator)
        param.copy_(noise * _DUMMY_SCALE)


def _shared(model: nn.Module, param: nn.Parameter) -> bool:
    """Tell if layers other than the wrappers around one layer hold this Parameter."""
    owners = {id(unwrap(module)) for module in model.modules() if any(p is param for p in module._parameters.values())}
    return len(owners) > 1


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
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
