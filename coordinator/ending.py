"""How a round ended, in object storage: written before the ledger forgets what the round owes, read when it is rebuilt.

What always holds: it is written once. Whoever writes it again after a crash finds the same ending there, and an ending
that contradicts it is an error that nobody resolves by overwriting.

The decision that a round has ended is `coordinator.rounds`'; this module only keeps it.
"""

from __future__ import annotations

from coordinator.rounds import RoundFacts
from rankup.errors import ConflictError, IntegrityError, StateError
from rankup.message import canonical_json
from rankup.protocol import RoundState
from rankup.records import RoundEnd
from rankup.store import Store
from rankup.stored import find_record
from rankup.versions import round_end_key


def end_of(round_id: str, facts: RoundFacts, now: float) -> RoundEnd:
    """The ending that `facts` tell of; `now` is Unix seconds. Raises StateError while the round goes on."""
    state = facts.state
    if state is RoundState.PUBLISHED or state is RoundState.REJECTED or state is RoundState.CANCELLED:
        return RoundEnd(
            round_id=round_id,
            state=state,
            reason=facts.reason[:4096],
            published_version=facts.published_version,
            evaluation=facts.evaluation,
            closed_at=facts.closed_at,
            rounds=facts.repeat,
            paused=facts.paused,
            ended_at=now,
        )
    raise StateError(f"round {round_id} is {state.value}: it has not ended")


def keep_end(store: Store, end: RoundEnd) -> RoundEnd:
    """Write the ending, or return the one that was written before.

    Raises:
        IntegrityError: object storage has another ending, or one that cannot be read.
    """
    try:
        store.put(round_end_key(end.round_id), canonical_json(end), if_absent=True, content_type="application/json")
    except ConflictError:
        there = stored_end(store, end.round_id)
        if there is None:
            raise
        if (there.state, there.published_version) != (end.state, end.published_version):
            raise IntegrityError(
                f"round {end.round_id} is {end.state.value}, but object storage says that it was {there.state.value}",
                remedy="Look at its versions and its receipts; move end.json away if it is what is wrong.",
            ) from None
        return there
    return end


def stored_end(store: Store, round_id: str) -> RoundEnd | None:
    """How the round ended, if it has. Raises IntegrityError where that cannot be read."""
    end = find_record(store, round_end_key(round_id), RoundEnd)
    if end is not None and end.round_id != round_id:
        raise IntegrityError(f"the ending of round {round_id} names {end.round_id}")
    return end
