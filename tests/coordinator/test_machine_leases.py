"""The ledger on a real Valkey under any order of calls: whole campaigns with claims, heartbeats, returns, expiries,
late deltas, verdicts, repeated and simultaneous calls, pauses, and a clock that jumps by an hour.

After every step all that the server has is read again, and compared with what it once acknowledged.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from coordinator import ledger_keys as keys
from coordinator.leases import TAKES_SUBMISSIONS, Lease
from coordinator.ledger import Ledger, NoWork, RoundStatus
from coordinator.rounds import Cancel, Close, Evaluated, Event, Folded, Open, Pause, Published, Resume, Tick
from rankup.errors import ConflictError, DeniedError, InputError, RankupError, RetryableError, StateError
from rankup.protocol import Heartbeat, LeaseState, RoundRequest, RoundState, SubmitStatement
from rankup.recipe import Aggregation, Recipe
from rankup.records import BlobRef, Evaluation, Receipt, RoundRecord, Submission
from rankup.targets import Target

if TYPE_CHECKING:
    from conftest import ValkeyServer

NOW = 1_800_000_000.0
LEASE_S = 60.0
HOUR = 3600.0
BASE = "0" * 64
WORKERS = [f"w-{number}" for number in range(5)]
PLACES = st.integers(0, 9)
HELD = (LeaseState.GRANTED, LeaseState.SUBMITTED)
JUDGED = (LeaseState.ACCEPTED, LeaseState.REJECTED)


@dataclass(frozen=True)
class Snapshot:
    """One round as the server has it."""

    round_id: str
    free: set[int]
    next: int
    holders: dict[int, int]
    accepted: dict[int, str]
    receipts: set[str]
    pending: set[str]


def record_of(number: int, *, shards: int, copies: int, per_lease: int, grace_s: float) -> RoundRecord:
    """Round `number` of one campaign, which takes the late deltas of the two before it."""
    recipe = Recipe(steps=10, aggregation=Aggregation(max_staleness=2))
    request = RoundRequest(
        model="tiny",
        dataset="docs",
        recipe=recipe,
        shards=shards,
        copies=copies,
        max_shards_per_lease=per_lease,
        lease_s=LEASE_S,
        lease_target_s=600.0,
        deadline_s=2 * HOUR,
        grace_s=grace_s,
        repeat=10_000,
    )
    return RoundRecord(
        round_id=f"r{number}",
        request=request,
        index=number,
        base_version=0,
        base_manifest=BASE,
        shards=tuple(BlobRef(sha256=f"{shard:064x}", size_bytes=10) for shard in range(shards)),
        targets={"q.weight": Target(d_out=4, d_in=4)},
        earlier_rounds=tuple(f"r{earlier}" for earlier in range(number - 1, max(-1, number - 3), -1)),
        opened_at=NOW,
    )


def submission_of(lease: Lease, digest: str, seconds: float) -> Submission:
    statement = SubmitStatement(
        round_id=lease.home,
        lease_id=lease.lease_id,
        fence=lease.fence,
        base_manifest=BASE,
        sha256=digest,
        size_bytes=100,
        tokens=50 * lease.shards,
        steps=5,
        first_loss=3.0,
        last_loss=2.5,
        seconds=seconds,
    )
    return Submission(
        statement=statement,
        signature="e" * 128,
        public_key="f" * 64,
        worker_id=lease.worker_id,
        worker_name="Ada",
        shard=lease.shard,
        shards=lease.shards,
        rank=lease.rank,
        submitted_at=NOW,
    )


def digest_of(lease: Lease, number: int = 0) -> str:
    return f"{int(lease.lease_id[2:], 16):063x}{number}"


class Campaign(RuleBasedStateMachine):
    """Any order of calls on one ledger; `told` remembers what it acknowledged."""

    valkey: ValkeyServer

    @initialize(
        shards=st.integers(2, 8),
        copies=st.integers(1, 2),
        per_lease=st.integers(1, 3),
        grace_s=st.sampled_from([0, 300]),
    )
    def open_campaign(self, shards: int, copies: int, per_lease: int, grace_s: float) -> None:
        self.client = self.valkey.client()
        self.client.flushall()
        self.runner = asyncio.Runner()
        without_disk = self.valkey.ledger_settings.model_copy(update={"require_fsync": False})
        self.ledger = self.runner.run(Ledger.connect(without_disk))
        self.shape = {"shards": shards, "copies": copies, "per_lease": per_lease, "grace_s": grace_s}
        self.now = NOW
        self.rounds: list[str] = []
        self.granted: dict[str, Lease] = {}
        self.handed_in: dict[str, Submission] = {}
        self.verdicts: dict[str, LeaseState] = {}
        self.next_round()

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            try:
                self.comes_to_an_end()
            finally:
                self.runner.run(self.ledger.close())
                self.runner.close()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The answer, or the refusal: but it must be one of ours, and none that promises success later."""
        return self.together([coroutine])[0]

    def together(self, coroutines: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        async def gather() -> list[Any]:
            return list(await asyncio.gather(*coroutines, return_exceptions=True))

        answers = self.runner.run(gather())
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, RankupError):
                raise answer
        return answers

    def next_round(self) -> None:
        record = record_of(len(self.rounds), **self.shape)
        after = self.rounds[-1] if self.rounds else None
        self.runner.run(self.ledger.create_round(record, self.now, after=after))
        self.rounds.append(record.round_id)

    @property
    def current(self) -> str:
        return self.rounds[-1]

    def state(self) -> RoundStatus:
        self.status = self.runner.run(self.ledger.round(self.current))
        return self.status

    def note_grant(self, worker: str, answer: object, status: RoundStatus, before: dict[str, Lease]) -> None:
        if not isinstance(answer, Lease):
            assert isinstance(answer, NoWork), answer
            return
        assert (answer.worker_id, answer.state) == (worker, LeaseState.GRANTED)
        if answer.lease_id in self.granted:
            assert answer.fence == self.granted[answer.lease_id].fence
            return
        assert status.facts.state is RoundState.OPEN
        assert not status.facts.paused
        assert answer.shards <= status.record.request.max_shards_per_lease
        for other in before.values():
            if other.home == answer.round_id and set(other.numbers) & set(answer.numbers):
                assert answer.fence > other.fence
        self.granted[answer.lease_id] = answer

    def note_submission(self, lease: Lease, submission: Submission, answer: object) -> None:
        if isinstance(answer, Lease):
            assert answer.contribution == submission.statement.sha256
            assert self.handed_in.setdefault(lease.lease_id, submission) == submission
            assert answer.state in (LeaseState.SUBMITTED, self.verdicts.get(lease.lease_id, LeaseState.REJECTED))
        else:
            assert isinstance(answer, StateError | DeniedError | InputError | RetryableError), answer

    def receipt(self, lease_id: str, good: bool) -> Receipt:
        return Receipt(
            submission=self.handed_in[lease_id], accepted=good, reason="as drawn", checks=(), norm=1.0, judged_at=NOW
        )

    def note_verdict(self, lease_id: str, answer: object) -> None:
        assert isinstance(answer, Lease), answer
        assert answer.state in JUDGED
        assert self.verdicts.setdefault(lease_id, answer.state) is answer.state

    def some(self, which: int, among: Collection[str]) -> list[Lease]:
        """One of these leases, counted from the newest, or none. Races make two runs of the same steps differ in
        what there is, so what is drawn must not depend on it."""
        ids = [lease_id for lease_id in self.granted if lease_id in among]
        return [self.granted[ids[-1 - which % len(ids)]]] if ids else []

    def any_lease(self, which: int) -> list[Lease]:
        if not self.granted:
            self.some_claim_at_once(WORKERS)
        return self.some(which, self.granted)

    # -- rules ---------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([-HOUR, -1.0, 1.0, LEASE_S / 2, LEASE_S + 1, HOUR]))
    def the_clock_jumps(self, seconds: float) -> None:
        self.now += seconds

    @rule(workers=st.lists(st.sampled_from(WORKERS), min_size=1, max_size=5))
    def some_claim_at_once(self, workers: list[str]) -> None:
        status, before = self.state(), dict(self.granted)
        answers = self.together([self.ledger.claim(worker, self.now) for worker in workers])
        got: dict[str, set[str | None]] = {}
        for worker, answer in zip(workers, answers, strict=True):
            self.note_grant(worker, answer, status, before)
            got.setdefault(worker, set()).add(answer.lease_id if isinstance(answer, Lease) else None)
        assert {len(leases) for leases in got.values()} == {1}, "who asks twice gets the same answer"

    @rule(worker=st.sampled_from(WORKERS))
    def somebody_claims_beside_a_delivery(self, worker: str) -> None:
        held = self.client.hget(keys.LIVE, worker)
        status, before = self.state(), dict(self.granted)
        answer = self.call(self.ledger.claim(worker, self.now, delivering=held or ""))
        assert not (isinstance(answer, Lease) and answer.lease_id == held)
        self.note_grant(worker, answer, status, before)

    @rule(which=PLACES, step=st.integers(0, 12))
    def somebody_beats(self, which: int, step: int) -> None:
        for lease in self.any_lease(which):
            beat = Heartbeat(fence=lease.fence, step=step)
            answer = self.call(self.ledger.heartbeat(lease.lease_id, lease.worker_id, beat, self.now))
            if not isinstance(answer, StateError):
                assert answer.lease.state in (LeaseState.GRANTED, LeaseState.EXPIRED)

    @rule(which=PLACES, is_sorry=st.booleans())
    def somebody_returns(self, which: int, is_sorry: bool) -> None:
        """And may hand in a delta all the same."""
        for lease in self.any_lease(which):
            answer = self.call(self.ledger.give_back(lease.lease_id, lease.worker_id, lease.fence, "", self.now))
            assert isinstance(answer, StateError) or answer.state in (LeaseState.RETURNED, LeaseState.EXPIRED)
            if is_sorry and lease.lease_id not in self.handed_in:
                submission = submission_of(lease, digest_of(lease), 10.0)
                answer = self.call(self.ledger.submit(lease.lease_id, lease.worker_id, submission, self.now))
                self.note_submission(lease, submission, answer)

    @rule(which=PLACES, seconds=st.sampled_from([1.0, 100.0, 1000.0]))
    def somebody_hands_in(self, which: int, seconds: float) -> None:
        if not self.granted.keys() - self.handed_in.keys():
            self.some_claim_at_once(WORKERS)
        for lease in self.some(which, self.granted.keys() - self.handed_in.keys()):
            submission = submission_of(lease, digest_of(lease), seconds)
            answer = self.call(self.ledger.submit(lease.lease_id, lease.worker_id, submission, self.now))
            self.note_submission(lease, submission, answer)

    @rule(which=PLACES)
    def somebody_hands_in_for_an_earlier_round(self, which: int) -> None:
        earlier = [lease.lease_id for lease in self.granted.values() if lease.home != self.current]
        for lease in self.some(which, set(earlier) - self.handed_in.keys()):
            submission = submission_of(lease, digest_of(lease), 10.0)
            answer = self.call(self.ledger.submit(lease.lease_id, lease.worker_id, submission, self.now))
            self.note_submission(lease, submission, answer)

    @rule(which=PLACES, other=st.booleans())
    def somebody_hands_in_again(self, which: int, other: bool) -> None:
        for lease in self.some(which, self.handed_in):
            again = submission_of(lease, digest_of(lease, 1), 1.0) if other else self.handed_in[lease.lease_id]
            answer = self.call(self.ledger.submit(lease.lease_id, lease.worker_id, again, self.now))
            assert isinstance(answer, StateError if other else Lease)
            if not other:
                self.note_submission(lease, again, answer)

    @rule(which=PLACES, mine=PLACES)
    def somebody_takes_what_is_not_theirs(self, which: int, mine: int) -> None:
        for lease in self.any_lease(mine):
            for theirs in self.some(which, self.handed_in.keys() - {lease.lease_id}):
                copied = submission_of(lease, self.handed_in[theirs.lease_id].statement.sha256, 1.0)
                answer = self.call(self.ledger.submit(lease.lease_id, lease.worker_id, copied, self.now))
                assert isinstance(answer, DeniedError | StateError | RetryableError)
            beat = Heartbeat(fence=lease.fence)
            for call in (
                self.ledger.heartbeat(lease.lease_id, "w-stranger", beat, self.now),
                self.ledger.give_back(lease.lease_id, lease.worker_id, lease.fence - 1, "", self.now),
            ):
                assert isinstance(self.call(call), DeniedError)

    @rule(which=PLACES, good=st.booleans(), times=st.integers(1, 3))
    def admission_judges(self, which: int, good: bool, times: int) -> None:
        for lease in self.some(which, self.handed_in):
            receipt = self.receipt(lease.lease_id, good)
            for answer in self.together([self.ledger.judge(lease.lease_id, receipt, self.now) for _ in range(times)]):
                self.note_verdict(lease.lease_id, answer)

    @rule(which=PLACES)
    def the_reaper_comes(self, which: int) -> None:
        self.runner.run(self.ledger.reap(self.rounds[-1 - which % len(self.rounds)], self.now))

    @rule(which=PLACES, good=st.booleans())
    def everything_happens_at_once(self, which: int, good: bool) -> None:
        for lease in self.any_lease(which):
            lease_id, worker = lease.lease_id, lease.worker_id
            submission = self.handed_in.get(lease_id, submission_of(lease, digest_of(lease), 1.0))
            answers = self.together(
                [
                    self.ledger.heartbeat(lease_id, worker, Heartbeat(fence=lease.fence, step=3), self.now),
                    self.ledger.submit(lease_id, worker, submission, self.now),
                    self.ledger.submit(lease_id, worker, submission, self.now),
                    self.ledger.give_back(lease_id, worker, lease.fence, "", self.now),
                    self.ledger.reap(lease.home, self.now),
                    self.ledger.apply(self.current, Tick(), self.now),
                ]
            )
            for answer in answers[1:3]:
                self.note_submission(lease, submission, answer)
            if lease_id in self.handed_in:
                answer = self.call(self.ledger.judge(lease_id, self.receipt(lease_id, good), self.now))
                self.note_verdict(lease_id, answer)

    @rule(which=PLACES)
    def all_who_ever_had_a_shard_hand_in_at_once(self, which: int) -> None:
        for one in self.any_lease(which):
            rivals = [other for other in self.granted.values() if other.home == one.home and one.shard in other.numbers]
            brought = [self.handed_in.get(own.lease_id, submission_of(own, digest_of(own), 1.0)) for own in rivals]
            answers = self.together(
                [
                    self.ledger.submit(own.lease_id, own.worker_id, submission, self.now)
                    for own, submission in zip(rivals, brought, strict=True)
                ]
            )
            for own, submission, answer in zip(rivals, brought, answers, strict=True):
                self.note_submission(own, submission, answer)
            judged = [own.lease_id for own in rivals if own.lease_id in self.handed_in]
            answers = self.together(
                [self.ledger.judge(lease_id, self.receipt(lease_id, True), self.now) for lease_id in judged]
            )
            for lease_id, answer in zip(judged, answers, strict=True):
                self.note_verdict(lease_id, answer)

    @rule(loss=st.sampled_from([2.9, 9.9]), steps=st.integers(1, 5))
    def the_keeper_goes_on(self, loss: float, steps: int) -> None:
        self.apply(Tick())
        evaluation = Evaluation(heldout_loss=loss, parent_heldout_loss=3.0, examples=1, tokens=1)
        for event in (Folded("c" * 64), Evaluated(evaluation), Published(len(self.rounds)))[:steps]:
            if self.status.facts.state in (RoundState.AGGREGATING, RoundState.EVALUATING):
                self.apply(event)
        if self.status.facts.state.ended and steps > 1:
            self.next_round()

    @rule(event=st.sampled_from([Pause(), Resume(), Open(), Close(), Close(grace=False), Cancel("test")]))
    def the_organiser_acts(self, event: Event) -> None:
        self.apply(event)

    def apply(self, event: Event) -> None:
        before = self.status
        answer = self.call(self.ledger.apply(self.current, event, self.now))
        assert isinstance(answer, tuple | StateError | ConflictError), answer
        after = self.state().facts
        assert after.counts == replace(before.facts, counts=after.counts).counts
        if before.facts.state.ended:
            assert replace(after, recorded=before.facts.recorded) == before.facts

    # -- what always holds ---------------------------------------------------------------------------------------------

    def look(self) -> tuple[dict[str, Lease], list[Snapshot]]:
        """Every lease, and the rounds that can still change."""
        shown, pipe = self.rounds[-3:], self.client.pipeline(transaction=False)
        for lease_id in self.granted:
            pipe.hgetall(keys.lease_key(lease_id))
        for round_id in shown:
            pipe.zrange(keys.round_key(round_id, "free"), 0, -1)
            pipe.hget(keys.round_key(round_id), "next")
            for part in ("holders", "accepted", "receipts"):
                pipe.hgetall(keys.round_key(round_id, part))
            pipe.zrange(keys.round_key(round_id, "pending"), 0, -1)
        found = pipe.execute()
        leases = {lease.lease_id: lease for lease in map(keys.parse_lease, found[: len(self.granted)])}
        rows = [found[start : start + 6] for start in range(len(self.granted), len(found), 6)]
        return leases, [
            Snapshot(
                round_id,
                {int(shard) for shard in free},
                int(next_one),
                {int(shard): int(count) for shard, count in holders.items()},
                {int(shard): lease_id for shard, lease_id in accepted.items()},
                set(receipts),
                set(pending),
            )
            for round_id, (free, next_one, holders, accepted, receipts, pending) in zip(shown, rows, strict=True)
        ]

    @invariant()
    def nothing_is_lost_and_nothing_counts_twice(self) -> None:
        self.status = self.runner.run(self.ledger.round(self.current))
        leases, rounds = self.look()
        for lease_id, submission in self.handed_in.items():
            lease = leases[lease_id]
            assert lease.contribution == submission.statement.sha256
            if lease.state is LeaseState.REJECTED and lease_id not in self.verdicts:
                # The reaper refuses what a cancelled round has not judged.
                judge = self.runner.run(self.ledger.round(lease.round_id))
                assert judge.facts.state is RoundState.CANCELLED
                self.verdicts[lease_id] = lease.state
            assert lease.state is self.verdicts.get(lease_id, LeaseState.SUBMITTED)
        assert {leases[lease_id].contribution for lease_id in self.granted.keys() - self.handed_in.keys()} <= {None}
        for snapshot in rounds:
            self.check_round(snapshot, leases.values())
        self.check_counts(rounds[-1], leases.values())

    def check_round(self, now: Snapshot, leases: Collection[Lease]) -> None:
        """Every shard is in one place, and every list says what the leases say."""
        here = [lease for lease in leases if lease.home == now.round_id]
        judged_here = [lease for lease in leases if lease.round_id == now.round_id]
        holding = [lease for lease in here if lease.state in HELD and lease.trained_for is None]
        held = Counter(shard for lease in holding for shard in lease.numbers)
        settling = [lease for lease in here if lease.state is LeaseState.ACCEPTED]
        settled = Counter(shard for lease in settling for shard in lease.numbers)
        training = [lease for lease in here if lease.state is LeaseState.GRANTED]
        in_hands = Counter(shard for lease in training for shard in lease.numbers)
        assert max(in_hands.values(), default=0) <= self.shape["copies"]
        assert max(settled.values(), default=0) <= 1, "a shard has one accepted delta"
        assert now.holders == dict(held)
        in_time = [lease for lease in settling if lease.trained_for is None]
        assert now.accepted == {shard: lease.lease_id for lease in in_time for shard in lease.numbers}
        assert now.free == set(range(now.next)) - set(held) - set(now.accepted)
        assert not {shard for shard in held | settled if shard >= now.next}
        for shard in range(now.next):
            fences = [lease.fence for lease in here if shard in lease.numbers]
            assert len(set(fences)) == len(fences) >= 1
        assert now.pending == {lease.lease_id for lease in judged_here if lease.state is LeaseState.SUBMITTED}
        assert now.receipts == {lease.contribution for lease in judged_here if lease.state is LeaseState.ACCEPTED}
        useful = [lease for lease in training if not settled.keys() & set(lease.numbers)]
        assert max(Counter(lease.worker_id for lease in useful).values(), default=0) <= 2, "nobody has three leases"
        delivered = self.client.hvals(keys.DELIVERING)
        to_train = [lease.worker_id for lease in useful if lease.lease_id not in delivered]
        assert len(set(to_train)) == len(to_train), "nobody has two leases to train"

    def check_counts(self, now: Snapshot, leases: Collection[Lease]) -> None:
        counts = self.status.facts.counts
        states = Counter(lease.state for lease in leases if lease.round_id == now.round_id)
        assert (counts.free, counts.accepted) == (len(now.free) + self.shape["shards"] - now.next, len(now.accepted))
        assert (counts.leased, counts.submitted, counts.rejected, counts.contributions) == (
            states[LeaseState.GRANTED],
            states[LeaseState.SUBMITTED],
            states[LeaseState.REJECTED],
            states[LeaseState.ACCEPTED],
        )
        if self.status.facts.state not in (*TAKES_SUBMISSIONS, RoundState.CANCELLED):
            assert not now.pending

    # -- and in the end ------------------------------------------------------------------------------------------------

    def comes_to_an_end(self) -> None:
        """If the volunteers do their work from here on, a round that is open gets a delta for every shard."""
        self.apply(Resume())
        for _ in range(4 * self.shape["shards"] + 4):
            status = self.state()
            if status.facts.state is not RoundState.OPEN or status.facts.counts.accepted == self.shape["shards"]:
                break
            self.now += 2 * HOUR
            self.runner.run(self.ledger.reap(self.current, self.now))
            for submission in self.runner.run(self.ledger.pending(self.current)):
                lease_id = submission.statement.lease_id
                self.note_verdict(
                    lease_id, self.call(self.ledger.judge(lease_id, self.receipt(lease_id, True), self.now))
                )
            status, before = self.state(), dict(self.granted)
            lease = self.call(self.ledger.claim("w-last", self.now))
            self.note_grant("w-last", lease, status, before)
            if isinstance(lease, Lease):
                submission = submission_of(lease, digest_of(lease), 1.0)
                self.note_submission(
                    lease, submission, self.call(self.ledger.submit(lease.lease_id, "w-last", submission, self.now))
                )
        else:
            raise AssertionError("the round does not fill up")
        self.nothing_is_lost_and_nothing_counts_twice()


def play(valkey: ValkeyServer, examples: int, steps: int) -> None:
    run_state_machine_as_test(
        type("CampaignHere", (Campaign,), {"valkey": valkey}),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_order_of_calls_loses_a_delta_or_counts_one_twice(valkey: ValkeyServer) -> None:
    play(valkey, 25, 50)


@pytest.mark.long
def test_no_order_of_twenty_thousand_calls_does(valkey: ValkeyServer) -> None:
    play(valkey, 250, 80)
