"""A controller with both of its sides, driven by hand, on a clock that only the test moves."""

from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.prompts import ListedTasks, SampleOrder
from specforge.testing.features import NamedFeatures
from specforge.testing.metadata_store import make_ref, make_task

NUM_SAMPLES = 6


class Run:
    """``features`` outlive the run where a test passes those of an earlier one."""

    def __init__(
        self, store, *, epochs=1, num_samples=NUM_SAMPLES, seed=1, clock=None, features=None, retain=False,
        tasks=None, **settings
    ):  # fmt: skip
        self.now = 0.0
        self.store = store
        self.order = SampleOrder(num_samples, epochs, seed=seed)
        self.writer, self.reader = memory_channel()
        self.features = NamedFeatures() if features is None else features
        options = {"window_slots": 4, "step_slots": 2, "lease_s": 10.0, **settings}
        self.controller = DataFlowController(
            store,
            self.order,
            tasks or ListedTasks([make_task(i) for i in range(num_samples)]),
            self.writer,
            ControllerSettings(**options),
            self.features,
            self.features if retain else None,
            clock=clock or (lambda: self.now),
        )

    def lease(self, n=100, worker="w0", key=""):
        return list(self.controller.lease(worker, n, 0.0, key).leases)

    def commit(self, leases, num_bytes=None):
        """As a worker does: put, commit, and free what was refused."""
        pairs = [(lease.task.sample_id, lease.generation) for lease in leases]
        self.features.put(pairs)
        accepted = self.controller.commit(
            [make_ref(lease.task, lease.generation, num_bytes) for lease in leases]
        ).accepted
        self.features.abort([pair for pair, ok in zip(pairs, accepted, strict=True) if not ok])
        return list(accepted)

    def poll(self, n=100):
        return self.reader.poll(n, 0.0)

    def train(self, refs, step):
        self.controller.ack([ref.slot for ref in refs], step)

    def indices(self, slots):
        return [self.order.index_at(s) for s in slots]

    def numbers(self, refs):
        return [self.order.linear(ref.slot) for ref in refs]

    def run_to_end(self, step=1):
        """Capture and train whatever is left, two slots a step; the slots trained."""
        trained = []
        while not self.reader.ended:
            self.commit(self.lease(3))
            while refs := self.poll(2):
                self.train(refs, step)
                trained += self.numbers(refs)
                step += 1
        return trained
