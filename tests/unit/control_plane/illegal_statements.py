"""What the schema refuses in every database, whatever the code above it does."""

from specforge.control_plane.metadata.base import Attempt, Dispatch
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.testing.metadata_store import make_ref, make_task


def fill(store: SqlMetadataStore) -> None:
    """Samples 0 and 1 trained and committed, 2 failed and crashed, 3 quarantined after two failures, 4 untouched."""
    store.register([make_task(i) for i in range(5)])
    store.lease([0, 1], "w0")
    store.commit([(i, make_ref(make_task(i), 1)) for i in range(2)])
    store.dispatch([Dispatch(0, 0, 1), Dispatch(1, 1, 1)])
    store.ack([0, 1], 1)
    store.lease([2, 3], "w0")
    store.fail(Attempt(2, 1), "odd")
    store.fail(Attempt(3, 1), "odd")
    store.lease([2, 3], "w0")
    store.crash([Attempt(2, 2)])
    store.fail(Attempt(3, 2), "odd")
    store.quarantine(3, 3, "poison")
    store.record(1, [5, 6])


ILLEGAL = [
    "INSERT INTO slots (slot, idx, generation) VALUES (0, 0, 1)",
    "INSERT INTO acks (slot, step) VALUES (0, 2)",
    "INSERT INTO acks (slot, step) VALUES (7, 2)",
    "UPDATE acks SET step = NULL",
    "UPDATE acks SET step = 0",
    "DELETE FROM slots",
    "UPDATE samples SET generation = 0 WHERE idx = 2",
    "UPDATE samples SET generation = generation + 1 WHERE idx = 0",
    "UPDATE samples SET state = 'pending' WHERE idx = 0",
    "UPDATE samples SET num_failures = -1 WHERE idx = 0",
    "UPDATE samples SET num_failures = 0 WHERE idx = 2",
    "UPDATE samples SET num_crashes = -1 WHERE idx = 2",
    "UPDATE samples SET state = 'odd' WHERE idx = 2",
    "UPDATE samples SET state = 'leased' WHERE idx = 2",
    "UPDATE samples SET state = 'quarantined' WHERE idx = 2",
    "UPDATE samples SET state = 'quarantined', quarantined_from = 5 WHERE idx = 2",
    "UPDATE samples SET state = 'pending', quarantined_from = NULL, num_failures = 1 WHERE idx = 3",
    "UPDATE samples SET state = 'released' WHERE idx = 4",
    "INSERT INTO samples (idx, state) VALUES (0, 'pending')",
    "INSERT INTO live (idx, generation, state, worker_id) VALUES (2, 2, 'leased', 'w0')",
    "INSERT INTO live (idx, generation, state, worker_id) VALUES (0, 1, 'leased', 'w0')",
    "UPDATE live SET generation = 2 WHERE idx = 0",
    "UPDATE live SET idx = 2 WHERE idx = 0",
    "UPDATE live SET ref = NULL WHERE idx = 0",
    "UPDATE live SET state = 'leased' WHERE idx = 0",
    "UPDATE live SET state = 'released', ref = NULL WHERE idx = 0",
    "INSERT INTO quarantines (idx, from_slot, reason) VALUES (3, 9, 'twice')",
    "INSERT INTO quarantines (idx, from_slot, to_slot, reason) VALUES (0, 9, 8, 'backwards')",
    "UPDATE quarantines SET to_slot = 9",
    "DELETE FROM quarantines",
    "INSERT INTO tasks (idx, sample_id, body) VALUES (9, 's0', '')",
    "INSERT INTO responses (idx, num_tokens, body) VALUES (1, 0, '[]')",
    "INSERT INTO responses (idx, num_tokens, body) VALUES (9, 0, '[]')",
    "INSERT INTO responses (idx, num_tokens, body) VALUES (2, -1, '[]')",
    "UPDATE responses SET body = '[1,2]'",
]


def execute(store: SqlMetadataStore, statement: str) -> None:
    """Past everything but the schema."""
    store.transact(lambda: store.database.connection.exec_driver_sql(statement))
