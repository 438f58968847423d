"""The line from an engine service to its ranks: one job out through the adapter, answers back through the mailbox."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from bridge.errors import ProtocolError
from bridge.protocol.codec import pack, unpack
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import AnyAnswer, AnyJob, RankAnswer, RankFailed, RankJob
from bridge.shm.mailbox import Mailbox
from engine_side.protocol import EngineDriver

A = TypeVar("A")


class RankClient:
    """Asks all ranks of one engine. One job at a time.

    Attributes:
        touched: some rank may have written to live parameters since this was last set to False.
    """

    def __init__(self, engine_id: str, adapter: EngineDriver) -> None:
        self.touched = False
        self._id = engine_id
        self._adapter = adapter
        # a fresh start per process: an answer left in a page by an earlier one is never taken for ours
        self._nonce = int.from_bytes(os.urandom(4), "little") << 16
        self._mailbox: Mailbox | None = None
        self._page = 0

    def assign(self, mailbox: Path, page: int) -> None:
        """Rank r answers on page `page + r` of this mailbox from now on."""
        self.close()
        self._mailbox, self._page = Mailbox.open(mailbox), page

    def ask(self, job: AnyJob, kind: type[A], deadline: Deadline) -> list[A]:
        """Run a job on every rank; the answers in rank order, all of one kind. Blocks.

        Raises the first failed rank's error with engine and rank in its `where`, DeadlineExceeded, PeerLost.
        """
        out: list[A] = []
        for rank, answer in enumerate(self._answers(job, deadline)):
            if isinstance(answer, RankFailed):
                self.touched |= answer.touched
                raise answer.error.rebuild(f"{self._id} rank {rank}")
            if not isinstance(answer, kind):
                raise ProtocolError("an answer of the wrong kind", expected=kind.__name__, got=type(answer).__name__)
            out.append(answer)
        return out

    def _answers(self, job: AnyJob, deadline: Deadline) -> list[AnyAnswer]:
        if self._mailbox is None:
            raise ProtocolError("this engine has no mailbox yet", where=self._id)
        self._nonce += 1
        self._adapter.dispatch(pack(RankJob(str(self._mailbox.path), self._page, self._nonce, job)), deadline)
        pages = range(self._page, self._page + self._adapter.ranks)
        answers: list[AnyAnswer] = []
        for rank, payload in enumerate(self._mailbox.wait(pages, self._nonce, deadline)):
            answer = unpack(payload, RankAnswer)
            if answer.rank != rank or answer.nonce != self._nonce:
                raise ProtocolError(
                    "an answer of another rank or job",
                    where=self._id,
                    expected=f"rank {rank}, nonce {self._nonce}",
                    got=f"rank {answer.rank}, nonce {answer.nonce}",
                )
            answers.append(answer.answer)
        return answers

    def close(self) -> None:
        """Let go of the mailbox. Idempotent."""
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None
