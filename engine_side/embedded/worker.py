"""The process of one further tensor-parallel rank: `python -m engine_side.embedded.worker FD`.

Started by `ranks.Child` only. It obeys frames on the inherited socket until told to stop or until the socket ends,
which it does when the engine's process ends for whatever reason.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import torch

from bridge.errors import BridgeError, PeerLost, ProtocolError
from bridge.protocol.codec import ErrorInfo
from bridge.protocol.deadline import Deadline
from engine_side.embedded.channel import Channel
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.ranks import Command, Done, DropLora, Job, Jobs, Prompts, Setup, Stop
from engine_side.embedded.runner import Batch, ModelRunner

_SEND_S = 30.0


def serve(channel: Channel) -> None:
    """Set up, then obey. Returns at `Stop`; raises PeerLost when the engine's process is gone."""
    setup: Setup = channel.receive(Setup, Deadline.after(_SEND_S))
    torch.set_num_threads(setup.threads)
    tp = Parallel(setup.rank, setup.config.tensor_parallel_size, setup.config.timeout_s)
    runner = ModelRunner(setup.config, tp)
    channel.send(Done(0), Deadline.after(_SEND_S))
    tp.connect(setup.store)
    jobs = Jobs(runner)
    while True:
        command: Command = channel.receive(Command, None)
        if isinstance(command, Batch):
            runner.forward(command)
        elif isinstance(command, Prompts):
            runner.prompt_logprobs(command.prompts, command.adapter)
        elif isinstance(command, DropLora):
            runner.drop_lora(command.name)
        elif isinstance(command, Job):
            with tp.until(Deadline.after(command.within_s)):
                error = jobs.attempt(command.job)
            channel.send(Done(command.number, error, tp.collectives), Deadline.after(_SEND_S))
        elif isinstance(command, Stop):
            return
        else:
            raise ProtocolError("a second setup")


def main() -> int:
    """Exit code 0 when told to stop or orphaned; otherwise the error is sent as the last frame."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it ends us
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), f"the engine, pid {os.getppid()}")
    try:
        serve(channel)
    except Exception as error:
        # Dying is the signal: rank 0's collective fails at once, then it reads why.
        try:
            channel.send(Done(0, ErrorInfo.of(error)), Deadline.after(1.0))
        except PeerLost:
            return 0
        return error.exit_code if isinstance(error, BridgeError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
