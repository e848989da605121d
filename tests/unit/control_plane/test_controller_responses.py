"""Prompts that the target answers: recorded once, before they are captured, whoever dies on the way."""

from dataclasses import replace

import pytest
from controlled_run import NUM_SAMPLES, Run

from specforge.control_plane.metadata.base import Position
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.control_plane.prompts import ListedTasks, RecordedTasks
from specforge.errors import ConfigError, ContractError, DataError, StaleGeneration
from specforge.testing.metadata_store import make_task

LONGEST = 4
PROMPTS = [replace(make_task(i), loss_spans=(), num_to_generate=LONGEST) for i in range(NUM_SAMPLES)]
PROMPT_TOKENS = PROMPTS[0].num_tokens


@pytest.fixture(params=["memory", "noop", "sqlite"])
def store(request, tmp_path):
    made = {
        "memory": InMemoryMetadataStore,
        "noop": NoOpMetadataStore,
        "sqlite": lambda: SqlMetadataStore(tmp_path / "ledger.sqlite"),
    }
    store = made[request.param]()
    yield store
    store.close()


def start(store, **options):
    return Run(store, tasks=ListedTasks(PROMPTS), **options)


def record(run, lease, response, worker="w0"):
    return run.controller.record(worker, lease.task.sample_id, lease.generation, response)


def with_response(lease, recorded):
    task = replace(lease.task, input_ids=recorded.input_ids, loss_spans=recorded.loss_spans, num_to_generate=0)
    return replace(lease, task=task)


def test_a_recorded_response_is_behind_its_prompt_and_alone_under_the_loss(store):
    run = start(store)
    (lease,) = run.lease(1)
    assert (lease.task.num_to_generate, lease.task.loss_spans) == (LONGEST, ())
    recorded = record(run, lease, [7, 8])
    assert recorded.input_ids == (*lease.task.input_ids, 7, 8)
    assert recorded.loss_spans == ((PROMPT_TOKENS, PROMPT_TOKENS + 2),)
    assert run.commit([with_response(lease, recorded)]) == [True]
    (ref,) = run.poll()
    assert (ref.ref.num_tokens, ref.ref.loss_spans) == (PROMPT_TOKENS + 2, recorded.loss_spans)


def test_the_first_response_stays_and_the_second_worker_is_given_it(store):
    run = start(store)
    (first,) = run.lease(1, "w0")
    recorded = record(run, first, [7, 8], "w0")
    assert record(run, first, [9], "w0") == recorded, "a repeated call"
    run.controller.leave("w0", "killed between record and commit")
    (again,) = run.lease(1, "w1")
    assert again.generation == 2
    assert (again.task.input_ids, again.task.loss_spans) == (recorded.input_ids, recorded.loss_spans)
    assert again.task.num_to_generate == 0
    assert record(run, again, [9], "w1") == recorded
    assert record(run, first, [5, 5], "w0") == recorded, "the one that was given up hears of it too"
    assert run.commit([again]) == [True]


def test_who_lost_the_lease_cannot_be_first(store):
    run = start(store)
    (first,) = run.lease(1, "w0")
    run.now = 11.0
    (second,) = run.lease(1, "w1")
    with pytest.raises(StaleGeneration, match=r"attempt 1 at sample .* is over"):
        record(run, first, [7], "w0")
    assert record(run, second, [8], "w1").input_ids[-1] == 8
    assert record(run, first, [7], "w0").input_ids[-1] == 8


def test_a_record_is_a_sign_of_life(store):
    run = start(store)
    (first, other) = run.lease(2, "w0")
    run.now = 9.0
    record(run, first, [7])
    run.now = 18.0
    assert {lease.task.sample_id for lease in run.lease(5, "w1")}.isdisjoint(
        {first.task.sample_id, other.task.sample_id}
    )


def test_what_was_not_asked_for_is_refused(store):
    run = start(store)
    (lease,) = run.lease(1)
    with pytest.raises(ContractError, match="at most 4 token ids"):
        record(run, lease, range(LONGEST + 1))
    with pytest.raises(ContractError, match="got 2 from -1 to 3"):
        record(run, lease, [3, -1])
    with pytest.raises(ContractError, match="has no recorded response"):
        run.commit([lease])
    with pytest.raises(StaleGeneration):
        run.controller.record("w0", "unknown", 1, [1])
    recorded = record(run, lease, [3])
    with pytest.raises(ContractError, match=f"{PROMPT_TOKENS + 1} tokens, its features {PROMPT_TOKENS}"):
        run.commit([lease])
    assert run.commit([with_response(lease, recorded)]) == [True]


def test_nothing_is_recorded_once_the_run_is_over(store):
    run = start(store)
    (lease,) = run.lease(1)
    run.controller.finish()
    with pytest.raises(StaleGeneration):
        record(run, lease, [7])


def test_credits_count_the_longest_response_until_there_is_one(store):
    per_sample = PROMPT_TOKENS + LONGEST
    run = start(store, bytes_per_token=1, max_resident_bytes=3 * per_sample + 1, window_slots=6, step_slots=1)
    leases = run.lease()
    assert len(leases) == 3
    assert run.controller.summary()["resident_bytes"] == 3 * per_sample
    for lease in leases:
        record(run, lease, [7])
    run.controller.leave("w0", None)
    assert len(run.lease()) == 3
    assert run.controller.summary()["resident_bytes"] == 3 * (PROMPT_TOKENS + 1)


def test_a_response_without_a_token_takes_its_slot(store):
    run = start(store)
    (lease,) = run.lease(1)
    recorded = record(run, lease, [])
    assert (recorded.input_ids, recorded.loss_spans) == (lease.task.input_ids, ())
    run.controller.leave("w0", None)
    (again,) = run.lease(1)
    assert again.task.num_to_generate == 0, "an empty response is one"
    assert run.commit([again]) == [True]
    assert len(run.poll()) == 1


def answer(run, leases):
    """As a worker does: what has no response yet is given one."""
    return [
        with_response(lease, record(run, lease, [lease.generation, lease.task.index]))
        if lease.task.num_to_generate
        else lease
        for lease in leases
    ]


def run_to_end(run, step=1):
    captured = {}
    while not run.reader.ended:
        leases = answer(run, run.lease(3))
        captured |= {lease.task.index: lease.task.input_ids for lease in leases}
        run.commit(leases)
        while refs := run.poll(2):
            run.train(refs, step)
            step += 1
    return captured


def test_later_epochs_capture_what_the_first_one_recorded(store):
    captured = run_to_end(start(store, epochs=3))
    assert captured == {task.index: (*task.input_ids, 1, task.index) for task in PROMPTS}


@pytest.mark.parametrize("source", ["listed", "ledger"])
def test_a_restarted_run_generates_nothing_anew(tmp_path, source):
    path = tmp_path / "ledger.sqlite"
    store = SqlMetadataStore(path)
    run = start(store)
    leases = run.lease(3)
    recorded = {lease.task.index: record(run, lease, [50 + lease.task.index]) for lease in leases[:2]}
    store.close()
    store = SqlMetadataStore(path)
    tasks = ListedTasks(PROMPTS) if source == "listed" else RecordedTasks(store)
    run = Run(store, tasks=tasks)
    run.controller.resume(Position(0, 0), None)
    again = {lease.task.index: lease.task for lease in run.lease(3)}
    assert {index: task.input_ids for index, task in again.items() if not task.num_to_generate} == {
        index: found.input_ids for index, found in recorded.items()
    }
    assert [task.num_to_generate for task in again.values()].count(LONGEST) == 1
    store.close()


def test_responses_that_were_made_otherwise_are_not_gone_on_with(store):
    start(store, responses='{"temperature": 0.8}')
    with pytest.raises(ConfigError, match=r"0\.8.*0\.9.*data\.generate"):
        start(store, responses='{"temperature": 0.9}')
    with pytest.raises(ConfigError, match="sample order"):
        start(store)


def test_a_run_with_longer_responses_is_not_the_same(tmp_path):
    store = SqlMetadataStore(tmp_path / "ledger.sqlite")
    start(store)
    with pytest.raises(DataError, match="differs from the one recorded"):
        Run(store, tasks=ListedTasks([replace(task, num_to_generate=LONGEST + 1) for task in PROMPTS]))
    store.close()
