"""Train a policy with GRPO: an engine samples the rollouts, and every optimiser step ends in a verified push.

    python examples/grpo.py --steps 40

The policy is a tiny random Qwen2. The task is to count on from the prompt, modulo 8: a random policy earns 0.125.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile

import bridge
from trainer_side.demo.grpo import Grpo, GrpoConfig, make_batch
from trainer_side.demo.policy import save_policy, tiny_qwen2
from trainer_side.demo.task import CountOn, grouped_prompts, reward

GROUPS, GROUP_SIZE = 16, 16


def main(steps: int) -> float:
    model = tiny_qwen2(seed=0)
    trainer = Grpo(model, GrpoConfig(learning_rate=3e-3))
    task, rng = CountOn(vocab_size=64), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(model, folder)
        b = bridge.launch(f"embedded:{folder}", name=f"grpo-{os.getpid()}", model=model, threads=1)
        try:
            for step in range(1, steps + 1):
                prompts = grouped_prompts(task, rng, GROUPS, GROUP_SIZE)
                rollouts = b.engines[0].generate(prompts, bridge.Sampling(max_tokens=12, seed=step))
                rewards = [reward(task, p, r.token_ids) for p, r in zip(prompts, rollouts, strict=True)]
                trainer.step(make_batch(prompts, rollouts, rewards, GROUP_SIZE))
                receipt = b.push(model.named_parameters())  # returns when every engine serves it, verified
                mean = sum(rewards) / len(rewards)
                print(f"step {step}  reward {mean:.3f}  version {receipt.version}  verified {receipt.verified}")
        finally:
            b.shutdown()  # stops the engine; close() would leave the daemon running for the next trainer
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
