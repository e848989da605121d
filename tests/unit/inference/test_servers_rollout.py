import threading

import pytest
from served_world import DEADLINE_S, SINKS, SPEC, World, wait_until

from specforge.contracts.capture_server import CaptureItem, CaptureRequest
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.local import LocalFeatureStore
from specforge.errors import (
    ConfigError,
    ControlPlaneError,
    EngineError,
    FeatureStoreError,
    ServerRefused,
    ServerUnavailable,
)
from specforge.inference.servers import stint
from specforge.inference.servers.listing import ServerListing
from specforge.inference.servers.specforge import SpecforgeServer
from specforge.prompts.config import GenerateOptions
from specforge.prompts.responses import ResponseOptions
from specforge.testing.fake_server import FakeServer
from specforge.testing.metadata_store import make_task
from specforge.testing.samples import SMALL_TARGET

TRANSPORTS = ["inline", "store"]


@pytest.fixture(autouse=True)
def short_silence(monkeypatch):
    monkeypatch.setattr(stint, "SILENCE_S", 0.2)


@pytest.fixture(autouse=True)
def no_thread_left():
    """Of ours: those of a fake server end with its connections."""
    yield
    wait_until(
        lambda: (
            not any(
                thread.name.startswith(("capture-0", "connections of", "leave")) for thread in threading.enumerate()
            )
        ),
        "all threads of the rollout have ended",
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_sample_is_captured_once_by_several_servers(transport):
    world = World(24, transport=transport, window_slots=16)
    with world.server(always="slow", slow_s=0.02) as one, world.server(always="slow", slow_s=0.02) as two:
        world.finish(world.rollout(one, two))
    world.check_all_trained_once()
    assert min(len(one.captured), len(two.captured)) > 0
    assert len(one.captured) + len(two.captured) == 24


def test_a_server_gets_one_request_at_first_and_never_more_than_it_takes():
    world = World(40, window_slots=40)
    with world.server(always="slow", slow_s=0.05, max_in_flight=3) as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()
    assert server.most_in_flight == 3


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang_up", "did not answer"),
        ("cut", "did not answer"),
        ("long_length", "did not answer"),
        ("short_length", "captured|none|lengths|layout|bytes|JSON|did not answer"),
        ("huge", "more than"),
        ("garbage", "what is none"),
        ("page", "text/html"),
        ("broken", "500"),
        ("swapped", "was asked for"),
        ("duplicate", "was asked for|what is none"),
        ("fewer_tokens", "which has 8"),
    ],
)
def test_what_a_server_does_wrong_once_is_asked_again(fault, reason, transport, caplog):
    world = World(5, transport=transport)
    with world.server(fault) as server:
        world.finish(world.rollout(server))
        url = server.url
    world.check_all_trained_once()
    assert world.controller.summary()["num_crashes"] == 1
    (said,) = [record.getMessage() for record in caplog.records if "asked again" in record.getMessage()]
    assert url in said
    assert any(part in said for part in reason.split("|"))


@pytest.mark.parametrize("fault", ["truncated", "swapped_tokens"])
def test_a_body_that_is_not_of_the_sample_is_asked_for_again(fault, caplog):
    world = World(5)
    with world.server(fault) as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()
    assert server.url in caplog.text


@pytest.mark.parametrize("fault", ["never", "slow", "trickle", "trickled_head"])
def test_a_server_that_does_not_come_to_an_end_is_given_up(fault, caplog):
    world = World(4, served={"timeout_s": 2.0})
    with world.server(fault, slow_s=60.0) as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()
    assert "no whole answer within 2 s" in caplog.text


@pytest.mark.parametrize("fault", ["busy", "no_room"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_has_no_room_is_no_samples_fault(fault, transport):
    world = World(5, transport=transport)
    with world.server(*[fault] * 8) as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()
    summary = world.controller.summary()
    assert (summary["num_crashes"], summary["num_failures"]) == (0, 0)


@pytest.mark.parametrize(("fault", "reason"), [("nan", "NaN or infinite values in feature"), ("prompt", "made up")])
def test_a_prompt_that_cannot_be_captured_is_quarantined(fault, reason):
    world = World(6, max_attempts=2, max_quarantined=1)
    bad = world.tasks[3].sample_id

    class Picky(FakeServer):
        def next_fault(self, request):
            super().next_fault(request)
            return fault if request.items[0].sample_id == bad else None

    with Picky(SMALL_TARGET) as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once(but=[bad])
    assert [generation for sample_id, generation in server.captured if sample_id == bad] == [1, 2]
    (quarantine,) = world.controller.checkpoint_state()["quarantines"]
    assert reason in quarantine["reason"]
    assert server.url in quarantine["reason"]


def test_a_prompt_that_kills_servers_is_quarantined_and_no_other():
    world = World(8, max_quarantined=1, max_crash_attempts=2)
    bad = world.tasks[2].sample_id
    with world.server(poison=[bad]) as one, world.server(poison=[bad]) as two:
        world.finish(world.rollout(one, two))
        urls = one.url, two.url
    world.check_all_trained_once(but=[bad])
    (quarantine,) = world.controller.checkpoint_state()["quarantines"]
    assert any(url in quarantine["reason"] for url in urls)


REFUSED = {
    "other_revision": "revision",
    "other_width": "another width",
    "fewer_layers": "other layers",
    "unfit": "422",
    "unauthorized": "token",
    "moved": "302",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_server_that_cannot_serve_the_run_is_used_no_more(fault, caplog):
    world = World(6)
    with world.server(always=fault) as wrong, world.server(always="slow", slow_s=0.05) as right:
        world.finish(world.rollout(wrong, right))
    world.check_all_trained_once()
    assert len(wrong.captured) <= 1 + (fault == "unfit")  # which is tried with one token
    assert world.controller.summary()["num_crashes"] == 0
    (said,) = [record.getMessage() for record in caplog.records if "not used any more" in record.getMessage()]
    assert wrong.url in said
    assert REFUSED[fault] in said


def test_a_sample_that_is_too_long_for_an_answer_fails_alone():
    big = PromptTask("big", 5, tuple(range(32)), ((2, 4),))
    world = World(tasks=[*(make_task(i) for i in range(5)), big], max_attempts=2, max_quarantined=1)
    with world.server() as one, world.server() as two:
        one.most_tokens = two.most_tokens = 31
        world.finish(world.rollout(one, two))
    world.check_all_trained_once(but=["big"])
    assert "422" in world.controller.checkpoint_state()["quarantines"][0]["reason"]


@pytest.mark.parametrize("fault", ["nan", "prompt"])
def test_a_server_at_which_every_sample_fails_is_looked_at_anew(fault):
    doubted = []

    def accept(server, _info):
        if server.url in doubted:
            raise ServerRefused(f"the capture server {server.url} failed its test")

    world = World(20, max_attempts=9, served={"accept": accept, "doubt": doubted.append})
    with world.server(always=fault) as sick, world.server(always="slow", slow_s=0.05) as well:
        world.finish(world.rollout(sick, well))
        assert doubted == [sick.url]
        assert well.url != sick.url
    world.check_all_trained_once()
    assert len(sick.captured) == sick.most_in_flight * stint.MAX_FAILURES == stint.MAX_FAILURES
    assert world.controller.summary()["num_crashes"] == 0


def test_a_store_that_stays_full_ends_the_run():
    world = World(4, transport="store", served={"unserved_s": 1.0, "timeout_s": 1.0})
    with world.server(always="no_room") as server:
        world.finish(world.rollout(server))
    assert isinstance(world.error, EngineError)
    assert f"the store of the capture server {server.url} took no features" in str(world.error)


def test_features_that_were_given_back_are_not_committed(monkeypatch):
    monkeypatch.setattr(stint, "ABANDON_S", 0.1)
    world = World(3, in_order=False)
    commits, going_on = [], threading.Event()

    class Slow:
        def __getattr__(self, name):
            return getattr(world.controller, name)

        def commit(self, refs):
            commits.append({ref.sample_id for ref in refs})
            assert len(commits) == 1 or going_on.wait(DEADLINE_S)
            return world.controller.commit(refs)

    with world.server() as server:
        client = SpecforgeServer(server.url)
        work = stint.Stint(client, "capture-0/0.1", Slow(), world.store, world.settings)
        worker = threading.Thread(target=work.work, daemon=True)
        worker.start()
        wait_until(lambda: len(commits) == 2 and len(world.store.stored()) == 3, "one commits, one waits for that")
        work.end(stint.Ending.UNAVAILABLE, ServerUnavailable("gone"))
        worker.join(DEADLINE_S)
        assert not worker.is_alive()
        going_on.set()
        wait_until(lambda: len(world.store.stored()) == 1, "what came too late is freed")
        client.close()
    wait_until(lambda: not any(t.name == "capture-0/0.1" for t in threading.enumerate()), "all requests have ended")
    assert len(set.union(*commits)) == 2
    assert len(commits) == 2


def test_a_run_without_any_server_that_can_serve_it_says_why_of_all():
    world = World(4)
    other = FakeServer(SMALL_TARGET)
    other.info = type(other.info)(**{**_fields(other.info), "target_revision": "another"})
    with other, world.server(token="secret") as locked:
        world.finish(world.rollout(other, locked))
        urls = other.url, locked.url
    assert isinstance(world.error, ServerRefused)
    assert all(url in str(world.error) for url in urls)
    assert "start it with the weights that the run names" in str(world.error)
    assert "give the run the token" in str(world.error)
    assert not world.trained


def _fields(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_a_server_that_dies_and_comes_back_is_used_again():
    world = World(30, window_slots=6)
    with (
        world.server(always="slow", slow_s=0.02) as server,
        world.running(world.rollout(server)) as (capture, trainer),
    ):
        for number in (4, 12):
            wait_until(lambda: sum(world.trained.values()) >= number, "some samples")  # noqa: B023
            server.stop()
            num_infos = server.num_infos
            server.start()
            wait_until(lambda: server.num_infos > num_infos, "it is asked again")  # noqa: B023
        capture.join(DEADLINE_S)
        trainer.join(DEADLINE_S)
    world.check_all_trained_once()


def test_work_of_a_server_that_is_gone_goes_to_another():
    world = World(8)
    with (
        world.server(always="never") as dying,
        world.server() as other,
        world.running(world.rollout(dying, other)) as (capture, trainer),
    ):
        wait_until(lambda: dying.captured, "it was asked")
        dying.stop()
        capture.join(DEADLINE_S)
        trainer.join(DEADLINE_S)
    world.check_all_trained_once()
    (sample,) = dying.captured
    assert (sample[0], 2) in other.captured


def test_servers_come_and_go_with_the_file(tmp_path):
    world = World(20, window_slots=4)
    file = tmp_path / "servers"
    with world.server(always="slow") as one, world.server(always="slow") as two:
        file.write_text(f"{one.url}\n")
        with world.running(world.rollout(listing=ServerListing((), file))) as (capture, trainer):
            wait_until(lambda: one.captured, "the first works")
            file.write_text(f"# moved\n{two.url}\n")
            wait_until(lambda: two.captured, "the second works")
            capture.join(DEADLINE_S)
            trainer.join(DEADLINE_S)
    world.check_all_trained_once()
    # what was in flight at the first was finished there
    assert len(one.captured) + len(two.captured) == 20
    assert world.controller.summary()["num_crashes"] == 0


def test_a_refused_server_is_asked_again_once_it_was_off_the_list(tmp_path):
    class Watched(ServerListing):
        num_looks = 0
        last = None

        def current(self):
            self.last = super().current()
            self.num_looks += 1
            return self.last

    world = World(4)
    file = tmp_path / "servers"
    listing = Watched((), file)
    with world.server("unauthorized") as server:
        file.write_text(f"{server.url}\n")
        with world.running(world.rollout(listing=listing)) as (capture, trainer):
            wait_until(lambda: len(server.captured) == 1, "it refused")
            num_infos, num_looks = server.num_infos, listing.num_looks
            wait_until(lambda: listing.num_looks >= num_looks + 2, "the list is looked at")
            assert server.num_infos == num_infos
            file.write_text("\n")
            wait_until(lambda: listing.last == (), "it is seen to be off the list")
            file.write_text(f"{server.url}\n")
            capture.join(DEADLINE_S)
            trainer.join(DEADLINE_S)
    world.check_all_trained_once()


def test_a_run_that_nobody_serves_ends_with_the_last_reason_of_each():
    world = World(4, served={"unserved_s": 3.0, "timeout_s": 3.0})
    server = world.server(always="never").start()
    server.stop()
    world.finish(world.rollout(server))
    assert isinstance(world.error, EngineError)
    assert "no capture server has captured anything for 3 s" in str(world.error)
    assert f"{server.url} did not answer /v1/info" in str(world.error)


def test_an_empty_list_of_servers_is_said_so(tmp_path):
    world = World(4, served={"unserved_s": 0.2, "timeout_s": 0.2})
    file = tmp_path / "servers"
    file.write_text("# none yet\n")
    world.finish(world.rollout(listing=ServerListing((), file)))
    assert isinstance(world.error, EngineError)
    assert str(file) in str(world.error)
    assert "none is listed" in str(world.error)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stop_ends_requests_in_flight_and_gives_the_leases_back(transport):
    world = World(8, transport=transport)
    with world.server(None, None, None, always="never") as server:
        rollout = world.rollout(server)
        with world.running(rollout) as (capture, _):
            wait_until(lambda: len(server.captured) > 3, "requests hang")
            rollout.stop()
            capture.join(DEADLINE_S)
            assert not capture.is_alive()
            assert world.error is None
            summary = world.controller.summary()
            assert (summary["num_leased"], summary["num_crashes"]) == (0, 0)
    held = {sample_id for sample_id, _ in world.store.stored()}
    assert len(held) <= 3


def test_a_control_plane_that_is_gone_is_raised_as_it_is():
    world = World(6)

    class Gone:
        def __getattr__(self, name):
            return getattr(world.controller, name)

        def commit(self, refs):
            raise ControlPlaneError("no answer")

    with world.server() as server:
        world.finish(world.rollout(server, control=Gone()))
    assert isinstance(world.error, ControlPlaneError)
    assert "no answer" in str(world.error)


def test_a_broken_store_ends_the_run_and_the_worker_leaves_with_the_reason():
    world = World(6)
    world.store.close()
    with world.server() as server:
        world.finish(world.rollout(server))
    assert isinstance(world.error, FeatureStoreError)
    assert world.controller.lease("capture-0/7.7", 1, 0.0).finished


def test_an_inline_put_waits_for_room():
    with FakeServer(SMALL_TARGET) as server:
        client = SpecforgeServer(server.url)
        task = make_task(0)
        request = CaptureRequest((CaptureItem("x", 1, task.input_ids),), SPEC, SINKS["inline"])
        num_bytes = client.capture(request, 20.0).reply.items[0].num_bytes
        client.close()
    # credits that do not know how large features are: the store itself must hold capture back
    world = World(10, store=LocalFeatureStore(capacity_bytes=3 * num_bytes), window_slots=10, in_order=False)
    with world.server() as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()


def test_a_sample_larger_than_the_store_fails_alone():
    big = PromptTask("big", 5, tuple(range(32)) * 3, ((2, 4),))
    tasks = [*(make_task(i) for i in range(5)), big]
    world = World(tasks=tasks, store=LocalFeatureStore(capacity_bytes=12_000), max_attempts=1, max_quarantined=1)
    with world.server() as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once(but=["big"])


def test_prompts_are_answered_and_recorded_before_they_are_captured():
    tasks = [PromptTask(f"s{i}", i, tuple(range(i, i + 6)), (), num_to_generate=4) for i in range(5)]
    options = ResponseOptions(GenerateOptions(max_new_tokens=4), seed=3)
    world = World(tasks=tasks, served={"responses": options})
    with world.server("hang_up") as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()


def test_leases_of_an_earlier_life_of_the_worker_are_not_waited_for():
    world = World(4, lease_s=3600.0)
    assert world.controller.lease("capture-0/0.5", 2, 0.0).leases
    with world.server() as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()
    assert world.controller.summary()["num_crashes"] == 0


def test_a_heartbeat_keeps_the_leases_of_a_slow_server():
    world = World(3, lease_s=1.0)
    with world.server(always="slow", slow_s=2.5) as server:
        world.finish(world.rollout(server))
    world.check_all_trained_once()
    assert world.controller.summary()["num_crashes"] == 0
    assert len(server.captured) == 3


def test_a_dialect_that_cannot_be_made_ends_the_run():
    world = World(3)

    def connect(url):
        raise TypeError(f"what is {url}?")

    with world.server() as server:
        world.finish(world.rollout(server, connect=connect))
    assert isinstance(world.error, TypeError)


def test_a_token_that_is_being_replaced_is_waited_for():
    world = World(3)
    trouble = [ConfigError("no such file"), ServerUnavailable("no thread is left")]

    def connect(url):
        if trouble:
            raise trouble.pop()
        return SpecforgeServer(url)

    with world.server() as server:
        world.finish(world.rollout(server, connect=connect))
    world.check_all_trained_once()
    assert not trouble


def test_a_server_that_is_not_accepted_is_asked_for_no_sample():
    def accept(server, info):
        assert info.protocol == 1
        if server.url == worse.url:
            raise ServerRefused(f"the capture server {server.url} failed its test")

    world = World(6, served={"accept": accept})
    with world.server() as worse, world.server() as better:
        world.finish(world.rollout(worse, better))
    world.check_all_trained_once()
    assert not worse.captured
