"""A campaign whose ledger is emptied at any point goes on to the same versions, and loses and counts nothing twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coordinator import actions, rebuild, restoring, traces
from coordinator import ledger_keys as keys
from coordinator.ending import stored_end
from coordinator.evidence import Evidence, Made, facts_from
from coordinator.keeper import Keeper
from coordinator.ledger import Ledger, NoWork
from coordinator.opening import open_round
from coordinator.people_settling import Bookkeeper
from coordinator.rounds import Cancel, EndCampaign, Pause
from coordinator.unjudged import keep_submission
from rankup.backup import back_up
from rankup.errors import ConflictError, IntegrityError, StateError
from rankup.givingback import restore
from rankup.membership import Action, Enrolment
from rankup.message import canonical_json
from rankup.protocol import LeaseState, RoundRequest, RoundState
from rankup.records import Cohort, Evaluation, Manifest, Member, Receipt, RoundEnd, RoundRecord, Submission
from rankup.signing import public_key_hex
from rankup.store import MemoryStore
from rankup.versions import cohort_key, manifest_key, open_envelope, receipt_key, round_key, submission_key
from tests.coordinator.ledger_world import audit
from tests.coordinator.ledger_world import record as toy_record
from tests.coordinator.test_keeper import KEY, NOW, Clock, ToyAggregator, connect, enrol, stocked_store, submission

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

ROUNDS = 3
SHARDS = 2
PUBLISHER = public_key_hex(KEY)


class LostError(Exception):
    """The ledger loses its data now."""


class KeepingAggregator(ToyAggregator):
    """Writes what the real one writes: receipts and the decision about the cohort. `lost_at`: the write after which the
    ledger is lost."""

    def __init__(self, store: MemoryStore, *, lost_at: str = "", loss: float = 2.0) -> None:
        super().__init__(store, loss=loss)
        self.memory = store
        self._lost_at = lost_at

    def _wrote(self, what: str) -> None:
        if what == self._lost_at:
            self._lost_at = ""
            raise LostError

    async def admit(self, record: RoundRecord, submission: Submission, now: float, valid_in_a_row: int) -> Receipt:
        receipt = await super().admit(record, submission, now, valid_in_a_row)
        receipt = receipt.model_copy(update={"judged_at": now})
        self.memory.put(receipt_key(record.round_id, submission.statement.sha256), canonical_json(receipt))
        self._wrote(f"receipt {submission.shard} of {record.index}")
        return receipt

    async def fold(self, record: RoundRecord, receipts: Sequence[Receipt], now: float) -> Manifest:
        members = tuple(Member(contribution=one.submission.statement.sha256, coefficient=1) for one in receipts)
        cohort = Cohort(
            round_id=record.round_id, rule="mean_by_tokens", denominator_log2=16, members=members, decided_at=now
        )
        try:
            self.memory.put(cohort_key(record.round_id), canonical_json(cohort), if_absent=True)
        except ConflictError:
            kept = Cohort.model_validate_json(self.memory.get(cohort_key(record.round_id), max_bytes=10**6))
            assert kept == cohort, "a fold that is done again must be about the same"
        self._wrote(f"cohort of {record.index}")
        manifest = await super().fold(record, receipts, now)
        # The name of a campaign is drawn by chance; the tensors must not depend on it.
        summed = hashlib.sha256(f"{record.base_version} {[m.contribution for m in members]}".encode()).hexdigest()
        entry = manifest.tensors["q.weight"].model_copy(update={"master": summed, "export": summed})
        return manifest.model_copy(update={"created_at": now, "tensors": {"q.weight": entry}})

    async def evaluate(self, record: RoundRecord, manifest: Manifest) -> Evaluation:
        self._wrote(f"draft of {record.index}")
        evaluation = await super().evaluate(record, manifest)
        self._wrote(f"evaluation of {record.index}")
        return evaluation

    async def publish(self, manifest: Manifest) -> Any:
        pointer = await super().publish(manifest)
        self._wrote(f"version {manifest.version}")
        return pointer


class Campaign:
    """Three rounds on a real ledger, played step by step; `lost_at` as in `KeepingAggregator`, or the number of a
    step."""

    def __init__(self, valkey: ValkeyServer, ledger: Ledger, *, lost_at: str | int = "", loss: float = 2.0) -> None:
        self.valkey = valkey
        self.ledger = ledger
        self.store = stocked_store()
        self.clock = Clock()
        self.lost_at = lost_at
        self.aggregator = KeepingAggregator(self.store, lost_at=lost_at if isinstance(lost_at, str) else "", loss=loss)
        self.losses = 0
        self.keeper = self.new_keeper()

    def new_keeper(self) -> Keeper:
        keeper = Keeper(self.ledger, self.store, self.aggregator, clock=self.clock)
        failed = keeper._on_failure

        async def on_failure(status: Any, exc: Exception) -> None:
            if isinstance(exc, LostError):
                await self.lose()
            else:
                await failed(status, exc)

        keeper._on_failure = on_failure  # type: ignore[method-assign]
        return keeper

    async def open(self, **request: Any) -> RoundRecord:
        await enrol(self.ledger, "w-1", "w-2")
        about = {"shards": SHARDS, "repeat": ROUNDS, "deadline_s": 3600, "grace_s": 0, "copies": 1} | request
        wanted = RoundRequest(model="tiny", dataset="docs", **about)
        return await open_round(self.ledger, self.store, wanted, index=0, previous=None, now=NOW)

    async def lose(self) -> None:
        """Valkey is emptied, and what object storage has is brought back."""
        self.losses += 1
        self.valkey.client().flushall()
        found = rebuild.plan(self.store, PUBLISHER)
        await rebuild.restore(self.ledger, self.store, found, self.clock())
        for trace in found.rounds:
            audit(self.valkey, trace.round_id, forgotten=True)

    async def volunteer(self, worker_id: str, *, good: bool = True) -> bool:
        """Claim and hand in one shard as the gateway takes it; False where there is none."""
        lease = await self.ledger.claim(worker_id, self.clock())
        if isinstance(lease, NoWork):
            return False
        handed_in = submission(lease, good=good)
        lease = await self.ledger.submit(lease.lease_id, worker_id, handed_in, self.clock())
        keep_submission(self.store, lease.round_id, handed_in)
        return True

    async def tick(self) -> None:
        await self.keeper.tick()
        await self.keeper.settle()
        self.clock.now += 1.0

    async def play(self) -> list[str]:
        """To the end; the states in which the rounds ended, newest first."""
        step = 0
        for _ in range(60):
            for act in (lambda: self.volunteer("w-1"), lambda: self.volunteer("w-2"), self.tick):
                if step == self.lost_at:
                    await self.lose()
                await act()
                step += 1
            if not await self.ledger.unfinished():
                break
        return [status.facts.state.value for status in await self.ledger.rounds()]

    def versions(self) -> list[tuple[Any, Any, Any]]:
        """Tensors, terms and round of every version but the base."""
        found = []
        for number in range(1, ROUNDS + 1):
            manifest, _, _ = open_envelope(
                self.store.get(manifest_key("tiny", number), max_bytes=10**6), publisher_key=PUBLISHER
            )
            found.append((manifest.tensors, manifest.terms, manifest.recipe))
        return found

    async def earned(self) -> list[tuple[str, int, int, int]]:
        return [(r.worker_id, r.accepted, r.rejected, r.tokens) for r in await self.ledger.people.scores.leaderboard()]


def play(valkey: ValkeyServer, scenario: Any) -> Any:
    async def run() -> Any:
        ledger = await connect(valkey)
        try:
            return await scenario(ledger)
        finally:
            await ledger.close()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def undisturbed(shared_valkey: ValkeyServer) -> tuple[Any, int]:
    shared_valkey.client().flushall()

    async def scenario(ledger: Ledger) -> Any:
        campaign = Campaign(shared_valkey, ledger)
        await campaign.open()
        assert await campaign.play() == ["published"] * ROUNDS
        return campaign.versions(), sum(row[1] for row in await campaign.earned())

    found: tuple[Any, int] = play(shared_valkey, scenario)
    return found


POINTS: list[str | int] = [
    *(0, 1, 2, 4, 8, 13, 18),
    *("receipt 0 of 0", "receipt 1 of 2", "cohort of 1", "draft of 0", "evaluation of 1", "version 1", "version 3"),
]


@pytest.mark.parametrize("lost_at", POINTS)
def test_a_ledger_that_is_lost_at_any_point_is_restored_and_the_versions_have_the_same_bits(
    valkey: ValkeyServer, undisturbed: tuple[Any, int], lost_at: str | int
) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger, lost_at=lost_at)
        await campaign.open()
        assert await campaign.play() == ["published"] * ROUNDS
        assert campaign.losses == 1
        versions, accepted = undisturbed
        assert campaign.versions() == versions
        assert sum(row[1] for row in await campaign.earned()) == accepted == ROUNDS * SHARDS
        if not str(lost_at).startswith("receipt"):
            assert not [key for key in campaign.store.list("rounds/") if "/submissions/" in key]

    play(valkey, scenario)


def test_a_ledger_that_is_lost_again_and_again_still_ends_at_the_same_versions(
    valkey: ValkeyServer, undisturbed: tuple[Any, int]
) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        await campaign.open()
        acts = (lambda: campaign.volunteer("w-1"), lambda: campaign.volunteer("w-2"), campaign.tick)
        for number in range(120):
            await acts[number % 3]()
            if number % 4 == 3:
                await campaign.lose()
            if not await ledger.unfinished():
                break
        assert campaign.losses > 5
        assert campaign.versions() == undisturbed[0]
        assert sum(row[1] for row in await campaign.earned()) == ROUNDS * SHARDS

    play(valkey, scenario)


@pytest.mark.parametrize("steps", [2, 13])
def test_a_campaign_goes_on_from_a_backup_in_another_bucket_with_another_valkey(
    valkey: ValkeyServer, undisturbed: tuple[Any, int], tmp_path: Path, steps: int
) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        await campaign.open()
        acts = (lambda: campaign.volunteer("w-1"), lambda: campaign.volunteer("w-2"), campaign.tick)
        for number in range(steps):
            await acts[number % 3]()
        back_up(campaign.store, tmp_path, bucket="memory", clock=campaign.clock)
        campaign.store = campaign.aggregator.memory = MemoryStore()
        campaign.aggregator.store = campaign.store
        restore(campaign.store, tmp_path)
        campaign.keeper = campaign.new_keeper()
        await campaign.lose()
        assert await campaign.play() == ["published"] * ROUNDS
        assert campaign.versions() == undisturbed[0]
        assert sum(row[1] for row in await campaign.earned()) == ROUNDS * SHARDS

    play(valkey, scenario)


def dump(valkey: ValkeyServer) -> dict[str, Any]:
    """What a restore must bring back as it was."""
    client = valkey.client()
    found: dict[str, Any] = {}
    for key in sorted(client.scan_iter(f"{keys.PREFIX}*", count=1000)):
        kind = client.type(key)
        value: Any = {
            "string": client.get,
            "hash": client.hgetall,
            "set": client.smembers,
            "zset": lambda name: client.zrange(name, 0, -1, withscores=True),
        }[kind](key)
        if ":fences" in key or key.endswith((":tokens", ":schema", ":workers", ":idle")):
            continue
        if ":lease:" in key:
            lease = keys.parse_lease(value)
            if lease.contribution is None:
                continue
            value = (lease.state, lease.contribution, lease.fence, lease.worker_id, lease.numbers, lease.round_id)
        elif key.count(":") == 2 and ":round:" in key:
            value.pop("rev")
            value["facts"] = json.loads(value["facts"]) | {"folded_manifest": None}
        elif key.count(":") == 2 and ":worker:" in key:
            value = value["doc"]
        found[key] = value
    return found


def test_what_a_restore_brings_back_is_what_was_there(valkey: ValkeyServer) -> None:
    """Also of rounds that were refused and of contributions that were."""

    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger, loss=3.0)
        await campaign.open(repeat=2, shards=2)
        for worker_id in ("w-1", "w-2"):
            worker = await ledger.people.worker(worker_id)
            enrolment = Enrolment(
                worker_id=worker_id,
                public_key=worker.public_key,
                name=worker.name,
                standing=worker.standing,
                enrolled_at=worker.enrolled_at,
            )
            actions.keep_enrolment(campaign.store, enrolment)
        assert await campaign.volunteer("w-2", good=False)
        await campaign.tick()
        await campaign.play()
        await Bookkeeper(ledger, campaign.store, PUBLISHER).look()
        before = dump(valkey)
        await campaign.lose()
        after = dump(valkey)
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert after[key] == value, key

    play(valkey, scenario)


def test_a_late_delta_stays_with_the_round_that_took_it(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        first = await campaign.open(quorum=1)
        old = await ledger.claim("w-2", NOW)
        assert not isinstance(old, NoWork)
        assert await campaign.volunteer("w-1")
        while len(await ledger.rounds()) == 1:
            await campaign.tick()
        handed_in = submission(old)
        said = handed_in.statement.model_copy(update={"base_manifest": first.base_manifest})
        handed_in = handed_in.model_copy(update={"statement": said})
        lease = await ledger.submit(old.lease_id, "w-2", handed_in, NOW)
        assert lease.trained_for == first.round_id
        keep_submission(campaign.store, lease.round_id, handed_in)
        await campaign.lose()
        [waiting] = await ledger.pending(lease.round_id)
        assert waiting == handed_in
        await campaign.tick()
        before = dump(valkey)
        await campaign.lose()
        after = dump(valkey)
        for part in ("late", "accepted", "receipts"):
            for round_id in (first.round_id, lease.round_id):
                assert after.get(keys.round_key(round_id, part)) == before.get(keys.round_key(round_id, part))
        assert after[keys.lease_key(lease.lease_id)] == before[keys.lease_key(lease.lease_id)]
        counts = (await ledger.round(lease.round_id)).facts.counts
        assert (counts.accepted, counts.contributions) == (0, 1)

    play(valkey, scenario)


def test_a_round_that_was_cancelled_stays_cancelled_and_what_nobody_judged_is_refused(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        record = await campaign.open()
        assert await campaign.volunteer("w-1")
        await ledger.apply(record.round_id, Cancel("a wrong dataset"), NOW)
        await campaign.tick()
        assert stored_end(campaign.store, record.round_id) is not None
        await campaign.lose()
        status = await ledger.round(record.round_id)
        assert (status.facts.state, status.facts.reason) == (RoundState.CANCELLED, "a wrong dataset")
        assert await ledger.unfinished() == []
        [lease] = await ledger.people.contributions("w-1")
        assert lease.state is LeaseState.REJECTED
        assert "a wrong dataset" in lease.verdict
        assert isinstance(await ledger.claim("w-2", NOW), NoWork)

    play(valkey, scenario)


def test_a_campaign_that_was_paused_and_ended_early_stays_so(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        record = await campaign.open()
        while (await ledger.round(record.round_id)).facts.state is not RoundState.EVALUATING:
            await campaign.volunteer("w-1")
            await campaign.tick()
        await ledger.apply(record.round_id, Pause(), NOW)
        while len(await ledger.rounds()) == 1:
            await campaign.tick()
        await campaign.lose()
        second = (await ledger.rounds())[0]
        assert (second.facts.state, second.facts.paused) == (RoundState.OPEN, True)
        assert isinstance(await ledger.claim("w-1", NOW), NoWork)
        await ledger.apply(second.record.round_id, EndCampaign(), NOW)
        await ledger.apply(second.record.round_id, Cancel("enough"), NOW)
        await campaign.tick()
        await campaign.lose()
        assert await ledger.unfinished() == []

    play(valkey, scenario)


def test_a_worker_that_nobody_recorded_is_known_by_what_it_handed_in_and_a_shard_is_not_trained_twice(
    valkey: ValkeyServer,
) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        await campaign.open(shards=3)
        assert await campaign.volunteer("w-1")
        await campaign.tick()
        old = await ledger.claim("w-2", NOW)
        assert not isinstance(old, NoWork)
        await campaign.lose()
        assert (await ledger.people.worker("w-1")).public_key == "f" * 64
        new = await ledger.claim("w-2", NOW)
        assert not isinstance(new, NoWork)
        assert new.shard == 1
        assert new.fence > old.fence + 1000
        third = await ledger.claim("w-1", NOW)
        assert not isinstance(third, NoWork)
        assert third.shard == 2
        assert isinstance(await ledger.claim("w-3", NOW), NoWork)

    play(valkey, scenario)


def test_a_ledger_with_rounds_in_it_is_not_touched(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        await campaign.open()
        before = dump(valkey)
        with pytest.raises(StateError, match="not empty"):
            await rebuild.restore(ledger, campaign.store, rebuild.plan(campaign.store, PUBLISHER), NOW)
        assert await rebuild.rebuild_if_lost(ledger, campaign.store, PUBLISHER, NOW, say=print) is None
        assert dump(valkey) == before

    play(valkey, scenario)


@pytest.mark.parametrize("commits", [1, 3, 5])
def test_a_restore_that_is_killed_grants_nothing_and_the_next_one_begins_anew(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        await campaign.open()
        for _ in range(8):
            await campaign.volunteer("w-1")
            await campaign.tick()
        await campaign.lose()
        whole = dump(valkey)
        valkey.client().flushall()
        left = commits

        async def commit(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise LostError
            await original(self, *args, **kwargs)

        original = restoring.Restore._commit
        monkeypatch.setattr(restoring.Restore, "_commit", commit)
        found = rebuild.plan(campaign.store, PUBLISHER)
        with pytest.raises(LostError):
            await rebuild.restore(ledger, campaign.store, found, NOW)
        assert isinstance(await ledger.claim("w-1", NOW), NoWork)
        calls = len(campaign.aggregator.calls)
        await campaign.tick()
        assert len(campaign.aggregator.calls) == calls
        monkeypatch.undo()
        assert await rebuild.rebuild_if_lost(ledger, campaign.store, PUBLISHER, NOW, say=lambda _line: None)
        assert dump(valkey) == whole

    play(valkey, scenario)


def test_of_two_who_restore_at_once_one_gives_up(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        await campaign.open()
        await campaign.play()
        valkey.client().flushall()
        found = rebuild.plan(campaign.store, PUBLISHER)
        outcomes = await asyncio.gather(
            *(rebuild.restore(ledger, campaign.store, found, NOW) for _ in range(2)), return_exceptions=True
        )
        assert sorted(type(one).__name__ for one in outcomes) == ["ConflictError", "Restored"]
        assert sum(row[1] for row in await campaign.earned()) == ROUNDS * SHARDS

    play(valkey, scenario)


@pytest.mark.parametrize("what", ["round.json", "receipts/", "end.json", "cohort.json"])
def test_a_record_that_cannot_be_read_is_named(valkey: ValkeyServer, what: str) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        await campaign.open()
        await campaign.play()
        key = next(key for key in campaign.store.list("rounds/") if what in key)
        campaign.store.put(key, b"{")
        valkey.client().flushall()
        with pytest.raises(IntegrityError) as caught:
            await rebuild.rebuild_if_lost(ledger, campaign.store, PUBLISHER, NOW, say=print)
        assert found_in(key, caught.value)
        assert isinstance(await ledger.claim("w-1", NOW), NoWork)

    play(valkey, scenario)


def found_in(key: str, error: IntegrityError) -> bool:
    return key in str(error) or key.split("/")[1] in str(error)


def test_versions_of_another_publisher_are_not_believed(valkey: ValkeyServer) -> None:
    store = stocked_store()
    store.put(round_key("tiny-r0001-abcdef"), canonical_json(toy_record("tiny-r0001-abcdef")))
    with pytest.raises(IntegrityError, match="key"):
        rebuild.plan(store, "a" * 64)


# -- the facts that follow ---------------------------------------------------------------------------------------------

EVALUATION = Evaluation(heldout_loss=2.0, parent_heldout_loss=2.5, examples=1, tokens=1)
MADE = Made(version=1, digest="d" * 64, evaluation=EVALUATION, closed_at=NOW + 9, published=True)
CANCEL = Action(what="cancel_round", by="x", subject={"round_id": "r1"}, at=NOW + 5)
CLOSE = Action(what="close_round", by="x", subject={"round_id": "r1"}, arguments={"last": True}, at=NOW + 5)
END = RoundEnd(round_id="r1", state=RoundState.REJECTED, reason="gate", evaluation=EVALUATION, ended_at=NOW + 20)


@pytest.mark.parametrize(
    ("evidence", "state"),
    [
        (Evidence(), RoundState.OPEN),
        (Evidence(orders=(CLOSE,)), RoundState.CLOSING),
        (Evidence(decided_at=NOW + 9, orders=(CLOSE,)), RoundState.AGGREGATING),
        (Evidence(decided_at=NOW + 9, folded=("f" * 64, NOW + 9)), RoundState.EVALUATING),
        (Evidence(decided_at=NOW + 9, orders=(CANCEL,)), RoundState.CANCELLED),
        (Evidence(decided_at=NOW + 9, overtaken="too late"), RoundState.CANCELLED),
        (Evidence(made=MADE, orders=(CANCEL,), folded=("f" * 64, NOW)), RoundState.PUBLISHED),
        (Evidence(made=replace(MADE, published=False), folded=("f" * 64, NOW + 9)), RoundState.EVALUATING),
        (Evidence(end=END, made=MADE), RoundState.REJECTED),
    ],
)
def test_the_strongest_evidence_decides(evidence: Evidence, state: RoundState) -> None:
    facts = facts_from(toy_record(shards=3), evidence)
    assert facts.state is state
    assert facts.shards == facts.quorum == 3
    if state in (RoundState.AGGREGATING, RoundState.EVALUATING):
        assert facts.closed_at == NOW + 9
    if evidence.made is not None and not evidence.made.published:
        assert facts.evaluation == EVALUATION, "the version may be written: its evaluation stands"
    assert facts.recorded is (evidence.end is not None)
    assert facts.repeat == (1 if CLOSE in evidence.orders or evidence.end else 2)


def test_a_pause_is_taken_up_and_its_end_moves_the_deadline() -> None:
    pause = Action(what="pause_round", by="x", subject={"round_id": "r1"}, at=NOW + 10)
    resume = Action(what="resume_round", by="x", subject={"round_id": "r1"}, at=NOW + 40)
    assert facts_from(toy_record(), Evidence(orders=(pause,))).paused
    resumed = facts_from(toy_record(), Evidence(orders=(pause, resume)))
    assert not resumed.paused
    assert resumed.deadline_at == NOW + 3600 + 30


def test_a_record_that_the_ledger_never_heard_of_opens_no_second_campaign() -> None:
    store = stocked_store()
    for number, name in enumerate(("tiny-r0001-aaaaaa", "tiny-r0001-bbbbbb")):
        record = toy_record(name).model_copy(update={"opened_at": NOW + number})
        store.put(round_key(name), canonical_json(record))
    states = {trace.round_id: trace.facts.state for trace in traces.survey(store, PUBLISHER)}
    assert states == {"tiny-r0001-aaaaaa": RoundState.CANCELLED, "tiny-r0001-bbbbbb": RoundState.OPEN}


def test_submissions_are_queued_again_only_where_there_is_no_verdict(valkey: ValkeyServer) -> None:
    async def scenario(ledger: Ledger) -> None:
        campaign = Campaign(valkey, ledger)
        record = await campaign.open()
        assert await campaign.volunteer("w-1")
        assert await campaign.volunteer("w-2")
        [first, second] = await ledger.pending(record.round_id)
        await campaign.tick()
        # As a gateway that was slow, or a keeper that was killed, leaves one behind.
        keep_submission(campaign.store, record.round_id, first)
        await campaign.lose()
        assert await ledger.pending(record.round_id) == []
        assert len(await ledger.receipts(record.round_id)) == 2
        assert campaign.store.head(submission_key(record.round_id, second.statement.lease_id)) is None
        digest = hashlib.sha256(b"").hexdigest()
        assert digest not in {one.submission.statement.sha256 for one in await ledger.receipts(record.round_id)}

    play(valkey, scenario)
