"""Prompt checks: validate prompt lengths and token ids that would crash an engine, by limits that only it knows."""

from __future__ import annotations

from bridge.errors import ConfigError
from engine_side.protocol import EngineDriver, KnowsVocabulary, PromptBatch


def require_fit(driver: EngineDriver, prompts: PromptBatch) -> None:
    """Raise ConfigError, naming the prompt, for one that is empty or longer than can be continued, or that holds an id
    outside the vocabulary: some engines crash on it."""
    longest = driver.max_prompt
    vocabulary = driver.vocabulary if isinstance(driver, KnowsVocabulary) else None
    for index, prompt in enumerate(prompts):
        where = f"prompt {index}"
        if not prompt or (longest is not None and len(prompt) > longest):
            raise ConfigError(
                "a prompt's length does not fit",
                where=where,
                expected="at least 1 token" if longest is None else f"1 to {longest} tokens",
                got=str(len(prompt)),
                remedy="shorten it, or start the engine with a longer context" if prompt else "leave it out",
            )
        wrong = next((ids for ids in (min(prompt), max(prompt)) if ids < 0 or ids >= (vocabulary or ids + 1)), None)
        if wrong is not None:
            raise ConfigError(
                "a token id outside the vocabulary",
                where=where,
                expected="0 or more" if vocabulary is None else f"0 to {vocabulary - 1}",
                got=str(wrong),
                remedy="tokenise with the tokenizer of the model that this engine serves",
            )
