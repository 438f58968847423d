"""Train a LoRA adapter with GRPO: each push sends A and B only, as a new version of the engine's adapter.

    python examples/grpo_adapter.py --steps 40

The policy is a tiny random Qwen2 under PEFT. The task is to count on from the prompt, modulo 8: a random policy earns
0.125.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile

import torch
from peft import LoraConfig, get_peft_model

import bridge
from trainer_side.demo.grpo import Grpo, GrpoConfig, make_batch
from trainer_side.demo.policy import save_policy, tiny_qwen2
from trainer_side.demo.task import CountOn, grouped_prompts, reward

GROUPS, GROUP_SIZE = 16, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
# The base has random weights, so the embedding and the head have to learn too; a pretrained one needs neither.
LORA = LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS)


def main(steps: int) -> float:
    torch.manual_seed(0)
    base = tiny_qwen2(seed=0)
    task, rng = CountOn(vocab_size=64), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(base, folder)  # before PEFT wraps it: the engine starts from the base
        model = get_peft_model(base, LORA)
        trainer = Grpo(model, GrpoConfig(learning_rate=1e-2))
        b = bridge.launch(
            f"embedded:{folder}", name=f"adapter-{os.getpid()}", model=model, threads=1, max_loras=3, max_lora_rank=8
        )
        try:
            for step in range(1, steps + 1):
                prompts = grouped_prompts(task, rng, GROUPS, GROUP_SIZE)
                rollouts = b.engines[0].generate(prompts, bridge.Sampling(max_tokens=12, seed=step))
                rewards = [reward(task, p, r.token_ids) for p, r in zip(prompts, rollouts, strict=True)]
                trainer.step(make_batch(prompts, rollouts, rewards, GROUP_SIZE))
                receipt = b.push(model.named_parameters(), inflight="keep")
                mean = sum(rewards) / len(rewards)
                print(
                    f"step {step}  reward {mean:.3f}  version {receipt.version}  verified {receipt.verified}  ", end=""
                )
                print(f"mode {receipt.mode}  nbytes {receipt.nbytes}")
        finally:
            b.shutdown()  # stops the engine; close() would leave the daemon running for the next trainer
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
