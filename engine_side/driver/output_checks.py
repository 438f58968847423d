"""Output checks: compare an engine's log-probabilities with the trainer's (canary), with its own before a push, and
with those that its caches give."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.errors import Busy, CanaryMismatch
from bridge.model import canary
from bridge.model.canary import LimitRule
from bridge.model.declared_losses import DeclaredLosses
from bridge.model.receipt import CanaryResult, Failure, LevelResult
from bridge.protocol.codec import Sampling
from bridge.protocol.coordinator_messages import Reference
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineLoad
from bridge.protocol.rank_jobs import LogprobsJob, Prompts, RankScores, Scores
from engine_side.driver.engine_noise import EngineNoise
from engine_side.driver.level_errors import canary_error
from engine_side.driver.rank_client import RankClient
from engine_side.protocol import EngineDriver

_GREEDY = Sampling(max_tokens=1, temperature=0.0)


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of the canary's prompts from an engine that holds `version`."""

    version: int
    prompts: Prompts
    scores: Scores
    rule: LimitRule


class OutputChecks:
    """Output checks of one engine that generates, over its pushes. Called by its service, in the order of a push; every
    call blocks for forwards of the engine."""

    def __init__(self, engine_id: str, driver: EngineDriver, ranks: RankClient) -> None:
        self._id = engine_id
        self._driver = driver
        self._ranks = ranks
        self._cached: list[int] = []
        self._expected: tuple[int, ...] = ()  # what followed it under the old weights
        self._fresh: tuple[int, float] | None = None  # a token after it and its log-probability past the cache
        self.noise = EngineNoise(engine_id, driver, ranks)
        self._cache_limit = canary.DEFAULT_FLOOR
        self._served: Answers | None = None  # by the version that serves
        self._loaded: Answers | None = None  # by the version that was just loaded

    def scores(self, prompts: Prompts, deadline: Deadline, lora: str | None = None) -> Scores:
        """Compute prompt log-probabilities past the scheduler, of the base model or with a loaded adapter."""
        return self._ranks.ask(LogprobsJob(prompts, lora), RankScores, deadline)[0].logprobs

    def warm_cache(self, request: EngineLoad, serving: int | None, deadline: Deadline) -> None:
        """Before the pause, put the old weights' KV of one canary prompt into the prefix cache, so that `check_cache`
        has something to find stale. Only a serving engine can; the prompt runs beside users' requests."""
        self._cached, self._expected, self._fresh = [], (), None
        wanted = "cache" in request.job.settings.levels and request.job.settings.kv == "reset"
        if wanted and request.reference is not None and serving is not None:
            tokens = [token for row in request.reference.prompts for token in row]
            # repeated until it fills a block of the cache and can be continued by one token, within the engine's limit
            length = max(self._driver.cache_grain, canary.TOKENS) + 2
            prompt = (tokens * -(-length // max(len(tokens), 1)))[:length][: self._driver.max_prompt]
            which = "base" if request.job.lora is None else "current"
            try:
                (said,) = self._driver.generate([prompt], _GREEDY, which, past_gate=True, deadline=deadline)
            except Busy:  # it is paused still, and keeps requests
                return
            self._cached, self._expected = prompt, said.token_ids

    def remember(self, request: EngineLoad, serving: int | None, deadline: Deadline) -> None:
        """Before the first write, note the log-probabilities of the version that serves now, unless its own canary has
        given them. Bits and probes do not show derived state, so a version that is put back is compared with these.

        In an engine that nothing was ever loaded into, and that holds the trainer's very bits, they also show its
        noise. Raises CanaryMismatch for a difference there that the engine's configuration does not declare.
        """
        alone = request.base or request.reference
        if alone is None or "canary" not in request.job.settings.levels:
            return
        measuring = self.noise.measurable(deadline) and request.unmoved
        if (self._served is None or measuring) and not self._ranks.touched and serving is not None:
            scores = self.scores(alone.prompts, deadline)
            self._served = Answers(serving, alone.prompts, scores, LimitRule(request.canary_floor))
            if measuring:
                self.noise.judge(self._weigh(request, alone, scores), alone, deadline)

    def _rule(self, request: EngineLoad, reference: Reference) -> LimitRule:
        return LimitRule(request.canary_floor, self.noise.expected(reference), request.job.settings.canary_limit)

    def canary(self, request: EngineLoad, deadline: Deadline) -> CanaryResult | None:
        """Compare the loaded version's log-probabilities with the trainer's; None when not asked for.

        An adapter is compared twice: without it with the trainer's base, with it with the trainer. Raises
        CanaryMismatch when the base differs, or when the adapter changes nothing.
        """
        self._loaded = None
        if request.reference is None:
            return None
        rule = self._rule(request, request.reference)
        self._cache_limit = rule.limit(canary.spread_of(request.reference.logprobs))
        if "canary" not in request.job.settings.levels:
            return None
        alone = request.reference if request.base is None else request.base
        scores = self._scores_with_cached(alone.prompts, deadline)
        self._loaded = Answers(request.version, alone.prompts, scores, LimitRule(request.canary_floor))
        drift = self._weigh(request, alone, scores)
        if request.job.lora is None:
            return drift
        if not drift.ok:
            raise CanaryMismatch(
                "without the adapter, the engine does not answer as the trainer's base does",
                where=f"{self._id}, {drift.tokens} canary tokens",
                expected=f"mean |difference| at most {drift.limit:.4f} nats",
                got=f"mean {drift.mean_abs:.4f}, max {drift.max_abs:.4f}",
                remedy="push mode='base' once, then the adapter",
            )
        if request.reference is alone:
            return drift
        acting = self._scores_with_cached(request.reference.prompts, deadline, request.job.lora)
        drift = self._weigh(request, request.reference, acting)
        if not drift.ok and acting == scores:
            raise CanaryMismatch(
                "the adapter is loaded and does not act",
                where=f"{self._id}, adapter {request.job.lora}",
                expected="other log-probabilities with it than without it, as in the trainer",
                got="the same, bit for bit",
                remedy="push mode='merged': the engine holds slots for modules, and does not compute with them",
            )
        return drift

    def _scores_with_cached(self, prompts: Prompts, deadline: Deadline, lora: str | None = None) -> Scores:
        """Score the prompts, and in the same forward the cached prompt with the token that followed it so far, which
        `check_cache` will need and which seldom changes in one step. A canary prompt with which the cached one begins
        is not computed twice: in a causal model later tokens change nothing before them."""
        if not self._cached or not self._expected:
            return self.scores(prompts, deadline, lora)
        whole = (*self._cached, self._expected[0])
        inside = [tuple(row) == whole[: len(row)] for row in prompts]
        *rest, found = self.scores(
            (*(row for row, covered in zip(prompts, inside, strict=True) if not covered), whole), deadline, lora
        )
        self._fresh = (whole[-1], found[-1])
        others = iter(rest)
        return tuple(
            found[: len(row) - 1] if covered else next(others) for row, covered in zip(prompts, inside, strict=True)
        )

    def _weigh(self, request: EngineLoad, reference: Reference, scores: Scores) -> CanaryResult:
        return canary.compare(reference.logprobs, scores, self._rule(request, reference))

    def check_cache(self, answered: bool, deadline: Deadline, lora: str | None = None) -> LevelResult:
        """After the reset, continue the prompt that was cached before the sync, with cache reads allowed.

        The first token's log-probability must be the one that the new weights give past the cache, which the canary has
        compared with the trainer's. An adapter needs no reset: its cache entries carry its name.
        """
        if not answered:
            return LevelResult("cache", False, 1, (Failure("reset", "caches dropped", "the engine refused"),))
        if not self._cached:
            return LevelResult("cache", True, 1, note="reset answered; no prompt was cached before")
        if len(self._cached) <= self._driver.cache_grain:
            return LevelResult("cache", True, 1, note="reset answered; no prompt that the engine takes fills its cache")
        which = lora or "base"
        try:
            (again,) = self._driver.generate([self._cached], _GREEDY, which, past_gate=True, deadline=deadline)
        except Busy:  # tokens of a version that does not serve yet would reach their callers
            return LevelResult("cache", True, 1, note="reset answered; not asked again while requests are kept")
        if not again.token_ids:
            failure = Failure("cached prompt", "one token", f"none ({again.finish_reason})")
            return LevelResult("cache", False, 1, (failure,))
        token = again.token_ids[0]
        if self._fresh is not None and self._fresh[0] == token:
            fresh = self._fresh[1]
        else:
            fresh = self.scores(((*self._cached, token),), deadline, lora)[0][-1]
        weighed = canary.compare([[fresh]], [again.logprobs], LimitRule(given=self._cache_limit))
        if not weighed.ok:
            failure = Failure("cached prompt", f"log-probability {fresh:.4f}", f"{again.logprobs[0]:.4f}")
            return LevelResult("cache", False, 2, (failure,))
        return LevelResult("cache", True, 2)

    def note_served(self, version: int) -> None:
        """Note that the loaded version serves now."""
        self._served = self._loaded if self._loaded is not None and self._loaded.version == version else None

    def require_former(self, version: int, deadline: Deadline) -> None:
        """After a version was put back, compare the engine with its own log-probabilities when it served `version`.
        Raises CanaryMismatch."""
        known = self._served
        if known is None or known.version != version:
            return
        drift = canary.compare(known.scores, self.scores(known.prompts, deadline), known.rule)
        if not drift.ok:
            raise canary_error(self._id, drift, DeclaredLosses())
