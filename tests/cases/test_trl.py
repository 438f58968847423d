"""TRL's own GRPO trainer, unpatched, with PEFT, rolling out from an engine that it pushes its adapter to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import tiny_qwen2

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 50
WORDS = 131


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{k}": k for k in range(WORDS - 2)} | {"<pad>": WORDS - 2, "<eos>": WORDS - 1}
    known = Tokenizer(models.WordLevel(words, unk_token="w0"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="<pad>", eos_token="<eos>")


def test_grpo_with_peft_pushes_its_adapter_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path / "model"
    model = tiny_qwen2(eos_token_id=WORDS - 1, pad_token_id=WORDS - 2)
    model.save_pretrained(folder)
    known = tokenizer()
    engine = Engine(EngineConfig(str(folder), max_loras=3, max_lora_rank=16))
    opened: list[bridge.Bridge] = []
    receipts: list[bridge.Receipt] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        live = trainer.accelerator.unwrap_model(trainer.model)
        if not opened:
            opened.append(bridge.attach(engine, model=live))
        (b,) = opened
        receipts.append(b.push(live.named_parameters()))
        ids = [known(prompt)["input_ids"] for prompt in prompts]
        answers = b.engines[0].generate(ids, bridge.Sampling(max_tokens=6, temperature=1.0), "current")
        return {
            "prompt_ids": ids,
            "completion_ids": [list(answer.token_ids) for answer in answers],
            "logprobs": [list(answer.logprobs) for answer in answers],
        }

    trainer = GRPOTrainer(
        model=model,
        processing_class=known,
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=STEPS, per_device_train_batch_size=2, num_generations=2,
            max_completion_length=6, use_vllm=False, use_cpu=True, learning_rate=1e-3, report_to=[], bf16=False,
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"w{k} w{k + 3} w{2 * k}" for k in range(20)]}),
        peft_config=LoraConfig(r=16, target_modules="all-linear", lora_alpha=32),
        rollout_func=rollout,
    )  # fmt: skip
    try:
        trainer.train()
        assert len(receipts) >= STEPS
        assert {receipt.mode for receipt in receipts} == {"adapter"}
        assert {receipt.verified for receipt in receipts} == {True}, [r.notes for r in receipts if r.notes][:1]
        assert all(receipt.engines[0].canary is not None for receipt in receipts)
    finally:
        for b in opened:
            b.close()
        engine.close()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
