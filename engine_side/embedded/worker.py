"""The process of one further tensor-parallel rank: `python -m engine_side.embedded.worker FD`.

Started by `ranks.RankProcess` only. It runs the calls that arrive on the inherited socket until the socket ends: when
the engine is closed, or when the engine's process ends for whatever reason.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import torch

from bridge.errors import BridgeError, PeerLost
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.deadline import Deadline
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.ranks import CallDone, Channel, DropLoraCall, JobCall, LogprobsCall, RankCall, RankSetup
from engine_side.embedded.runner import ModelRunner

_SEND_S = 30.0


def serve(channel: Channel) -> None:
    """Load the model, join the group, and run calls. Raises PeerLost at the end of the stream."""
    setup: RankSetup = channel.receive(RankSetup, Deadline.after(_SEND_S))
    torch.set_num_threads(setup.threads)
    tp = Parallel(setup.rank, setup.config.tensor_parallel_size, setup.config.timeout_s)
    runner = ModelRunner(setup.config, tp)
    channel.send(CallDone(0), Deadline.after(_SEND_S))
    tp.connect(setup.store)
    while True:
        call: RankCall = channel.receive(RankCall, None)
        if isinstance(call, JobCall):
            with tp.until(Deadline.after(call.within_s)):
                error = runner.attempt(call.job)
            channel.send(CallDone(call.number, error, tp.collectives), Deadline.after(_SEND_S))
        elif isinstance(call, LogprobsCall):
            runner.prompt_logprobs(call.prompts, call.lora)
        elif isinstance(call, DropLoraCall):
            runner.drop_lora(call.name)
        else:
            runner.forward(call)


def main() -> int:
    """Serve; exit code 0 at the end of the stream. Any other error is sent as the last frame."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it ends us
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), f"the engine, pid {os.getppid()}")
    try:
        serve(channel)
    except Exception as error:
        # Rank 0's collective fails as soon as this process ends; then it reads why.
        try:
            channel.send(CallDone(0, ErrorInfo.of(error)), Deadline.after(1.0))
        except PeerLost:
            return 0
        return error.exit_code if isinstance(error, BridgeError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
