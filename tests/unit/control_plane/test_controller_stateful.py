"""Random lives of a run against a small model: exactly once, in order, whatever expires, fails or restarts."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.prompts import SampleOrder
from specforge.testing.metadata_store import make_ref, make_task

NUM_SAMPLES, EPOCHS, WINDOW, LEASE_S = 5, 2, 4, 10.0
ORDER = SampleOrder(NUM_SAMPLES, EPOCHS, seed=3)
TASKS = [make_task(i) for i in range(NUM_SAMPLES)]


class ControllerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.store, self.now, self.step = InMemoryMetadataStore(), 0.0, 0
        self.trained: list[int] = []
        self.checkpoint = (0, 0)
        self.newest: dict[str, int] = {}
        self.start()

    def start(self):
        self.writer, self.reader = memory_channel()
        self.live: set[tuple[str, int]] = set()
        self.held: list = []
        self.received: list = []
        limits = ControllerSettings(window_slots=WINDOW, step_slots=2, lease_s=LEASE_S, max_attempts=10**6)
        self.controller = DataFlowController(
            self.store, ORDER, TASKS, self.writer, limits, self.release, clock=lambda: self.now
        )
        self.controller.resume(*self.checkpoint)

    def release(self, pairs):
        for pair in pairs:
            self.live.remove(pair)

    @rule(n=st.integers(1, 4))
    def lease(self, n):
        for lease in self.controller.lease("w", n, 0.0).leases:
            assert lease.generation > self.newest.get(lease.task.sample_id, 0)
            self.newest[lease.task.sample_id] = lease.generation
            self.held.append((self.now + LEASE_S, lease))

    @rule(data=st.data())
    def commit(self, data):
        if self.held:
            deadline, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            (accepted,) = self.controller.commit([make_ref(lease.task, lease.generation)]).accepted
            assert accepted == (self.now < deadline)
            if accepted:
                self.live.add((lease.task.sample_id, lease.generation))

    @rule(data=st.data())
    def fail(self, data):
        if self.held:
            _, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.controller.fail("w", lease.task.sample_id, lease.generation, "odd")

    @rule(seconds=st.sampled_from([1.0, 6.0, LEASE_S]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(n=st.integers(1, 3))
    def train(self, n):
        self.received += self.reader.poll(10, 0.0)
        refs, self.received = self.received[:n], self.received[n:]
        if refs:
            assert all((ref.ref.sample_id, ref.ref.generation) in self.live for ref in refs)
            self.step += 1
            self.controller.ack([ref.slot for ref in refs], self.step)
            self.trained += [ORDER.linear(ref.slot) for ref in refs]

    @rule()
    def save(self):
        self.controller.checkpointed(self.step)
        self.checkpoint = (len(self.trained), self.step)

    @rule()
    def crash(self):
        self.trained, self.step = self.trained[: self.checkpoint[0]], self.checkpoint[1]
        self.start()

    @invariant()
    def every_slot_once_in_order_and_memory_bounded(self):
        assert self.trained == list(range(len(self.trained)))
        counts = self.store.counts()
        assert counts.num_slots_trained == len(self.trained)
        assert counts.num_leased + counts.num_committed <= WINDOW
        assert counts.num_committed == len(self.live)


TestController = pytest.mark.timeout(60)(ControllerMachine.TestCase)
TestController.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
