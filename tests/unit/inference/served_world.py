"""A run around capture servers: a real controller, a store, and a trainer that looks at every feature it is given."""

import contextlib
import threading
from collections import Counter

import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import InlineSink, SharedMemorySink
from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.prompts import ListedTasks, SampleOrder
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.tensors import materialised
from specforge.errors import ProducerFailed
from specforge.inference.servers.listing import ServerListing
from specforge.inference.servers.rollout import ServedRollout
from specforge.inference.servers.specforge import SpecforgeServer
from specforge.inference.servers.stint import ServedSettings
from specforge.testing.fake_server import FakeServer, made_features
from specforge.testing.metadata_store import make_task
from specforge.testing.samples import SMALL_TARGET

SPEC = CaptureSpec((1, 3), True)
SINKS = {"inline": InlineSink(), "store": SharedMemorySink("run", 1 << 20, 64)}
DEADLINE_S = 90.0


def wait_until(condition, what):
    ended = threading.Event()
    for _ in range(int(DEADLINE_S / 0.02)):
        if condition():
            return
        ended.wait(0.02)
    raise AssertionError(f"never: {what}")


class StoreOfServers(LocalFeatureStore):
    """What servers put here says that it is in shared memory."""

    name = "shared_memory"


class World:
    def __init__(self, num_samples=6, *, store=None, tasks=None, transport="inline", served=None, **settings):
        self.tasks = tasks or [make_task(i) for i in range(num_samples)]
        self.store = store or (LocalFeatureStore() if transport == "inline" else StoreOfServers())
        self.ledger = InMemoryMetadataStore()
        self.writer, self.reader = memory_channel()
        self.order = SampleOrder(len(self.tasks), 1, seed=0)
        self.controller = DataFlowController(
            self.ledger,
            self.order,
            ListedTasks(self.tasks),
            self.writer,
            ControllerSettings(**{"window_slots": 8, "step_slots": 2, "lease_s": 60.0, **settings}),
            self.store,
        )
        self.settings = ServedSettings(
            **{
                "worker_id": "capture-0",
                "spec": SPEC,
                "target": SMALL_TARGET,
                "sink": SINKS[transport],
                "timeout_s": 20.0,
                "longest_backoff_s": 0.02,
                "poll_s": 0.2,
                **(served or {}),
            }
        )
        self.trained: Counter[str] = Counter()
        self.failure: ProducerFailed | None = None
        self.error: BaseException | None = None

    def server(self, *faults, **options):
        return FakeServer(SMALL_TARGET, faults=faults, store=self.store, **options)

    def rollout(self, *servers, listing=None, control=None, connect=SpecforgeServer):
        listing = listing or ServerListing([server.url for server in servers])
        return ServedRollout(control or self.controller, connect, listing, self.store, self.settings)

    def finish(self, rollout):
        """Capture and train to the end; what ``run`` raised is in ``error``."""
        with self.running(rollout) as (capture, trainer):
            capture.join(DEADLINE_S)
            assert not capture.is_alive(), "the rollout hangs"
            if self.error is None:
                trainer.join(DEADLINE_S)

    @contextlib.contextmanager
    def running(self, rollout):
        """Both sides in threads of their own; stopped at the end."""
        capture = threading.Thread(target=self._capture, args=(rollout,), name="the rollout", daemon=True)
        trainer = threading.Thread(target=self._train, name="the trainer", daemon=True)
        capture.start()
        trainer.start()
        try:
            yield capture, trainer
        finally:
            rollout.stop()
            capture.join(DEADLINE_S)
            self.controller.finish()
            trainer.join(DEADLINE_S)
            assert not capture.is_alive()
            assert not trainer.is_alive()

    def check_all_trained_once(self, but=()):
        if self.error is not None:
            raise AssertionError("one side failed") from self.error
        assert self.failure is None
        assert self.trained == {task.sample_id: 1 for task in self.tasks if task.sample_id not in but}
        assert self.store.stored() == []
        account = self.controller.account()
        assert account["num_quarantined"] == len(but)
        assert account["num_leased"] == 0

    def _capture(self, rollout):
        try:
            rollout.run()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def _train(self):
        step = 0
        tokens = {task.sample_id: task.input_ids for task in self.tasks}
        try:
            while not self.reader.ended:
                for slot_ref in self.reader.poll(2, 0.2):
                    ref = slot_ref.ref
                    ((found, handle),) = self.store.get([ref])
                    ids = tuple(found["input_ids"].tolist())
                    assert ids[: len(tokens[ref.sample_id])] == tokens[ref.sample_id]
                    for name, source in made_features(ids, SPEC, SMALL_TARGET.hidden_size).items():
                        assert torch.equal(found[name], materialised(source)), (ref.sample_id, name)
                    assert ref.worker_id.startswith("capture-0/")
                    assert (ref.num_tokens, ref.target_revision) == (len(ids), SMALL_TARGET.revision)
                    self.store.release([handle])
                    self.trained[ref.sample_id] += 1
                    step += 1
                    self.controller.ack([slot_ref.slot], step)
        except ProducerFailed as error:
            self.failure = error
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error
            self.controller.fail_run(repr(error))
