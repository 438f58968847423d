"""Rank client: send one job to all ranks of an engine, and collect their answers from the mailbox."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from bridge.errors import REPORT, ProtocolError
from bridge.protocol.codec import pack, unpack
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import AnyJob, LoadJob, RankAnswer, RankFailed, RankJob, RankReply
from bridge.shm.mailbox import Mailbox
from engine_side.protocol import EngineDriver

A = TypeVar("A")


class RankClient:
    """Reaches all ranks of one engine, one job at a time.

    Attributes:
        touched: some rank may have written to live parameters since this was last set to False.
    """

    def __init__(self, engine_id: str, driver: EngineDriver) -> None:
        self.touched = False
        self._id = engine_id
        self._driver = driver
        # a fresh start per process: an answer left in a page by an earlier one is never taken for ours
        self._nonce = int.from_bytes(os.urandom(4), "little") << 16
        self._mailbox: Mailbox | None = None
        self._page = 0

    def assign(self, mailbox: Path, page: int) -> None:
        """Use this mailbox from now on: rank r answers on page `page + r`."""
        self.close()
        self._mailbox, self._page = Mailbox.open(mailbox), page

    def ask(self, job: AnyJob, kind: type[A], deadline: Deadline) -> list[A]:
        """Run a job on every rank, and expect answers of one kind. Blocks and raises as `run` does."""
        answers: list[A] = [answer for answer in self.run(job, deadline) if isinstance(answer, kind)]
        if len(answers) != self._driver.ranks:
            raise ProtocolError(
                "a rank answered another job",
                where=self._id,
                expected=kind.__name__,
                got=f"{len(answers)} such answers of {self._driver.ranks} ranks",
                remedy=REPORT,
            )
        return answers

    def run(self, job: AnyJob, deadline: Deadline) -> list[RankReply]:
        """Run a job on every rank; the answers in rank order. Blocks.

        Raises the first failed rank's error with engine and rank in its `where`, DeadlineExceeded, PeerLost.
        """
        if self._mailbox is None:
            raise ProtocolError(
                "this engine has no mailbox yet",
                where=self._id,
                expected="a mailbox",
                got="none",
                remedy="claim it first",
            )
        self._nonce += 1
        before, writes = self.touched, isinstance(job, LoadJob) and job.lora is None
        self.touched |= writes  # a rank that does not answer may have written
        self._driver.dispatch(pack(RankJob(str(self._mailbox.path), self._page, self._nonce, job)), deadline)
        pages = range(self._page, self._page + self._driver.ranks)
        answers: list[RankReply | RankFailed] = []
        for rank, payload in enumerate(self._mailbox.wait(pages, self._nonce, deadline)):
            found = unpack(payload, RankAnswer)
            if found.rank != rank or found.nonce != self._nonce:
                raise ProtocolError(
                    "an answer of another rank or job",
                    where=self._id,
                    expected=f"rank {rank}, nonce {self._nonce}",
                    got=f"rank {found.rank}, nonce {found.nonce}",
                    remedy=REPORT,
                )
            answers.append(found.answer)
        replies = [answer for answer in answers if not isinstance(answer, RankFailed)]
        failed = [(rank, answer) for rank, answer in enumerate(answers) if isinstance(answer, RankFailed)]
        self.touched = before or any(answer.touched for _, answer in failed) or (writes and bool(replies))
        for rank, answer in failed:
            raise answer.error.rebuild(f"{self._id} rank {rank}")
        return replies

    def close(self) -> None:
        """Let go of the mailbox. Idempotent."""
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None
