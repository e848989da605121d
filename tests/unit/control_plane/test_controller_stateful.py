"""Random lives of a run against a model of ten lines: exactly once, whoever dies, falls silent, repeats or restarts."""

import pytest
from controlled_run import Run
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specforge.control_plane.metadata.base import Position
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.errors import InvalidTransition
from specforge.testing.features import NamedFeatures

NUM_SAMPLES, EPOCHS, WINDOW, LEASE_S = 5, 3, 4, 10.0
WORKERS = ("w0", "w1", "w2")


class Model:
    """What must be true of the surviving weights: which slots they contain, and since which optimizer step."""

    def __init__(self):
        self.step, self.trained, self.checkpoint = 0, {}, (0, {})

    def train(self, slots):
        self.step += 1
        assert not set(slots) & set(self.trained)
        self.trained |= dict.fromkeys(slots, self.step)

    def save(self):
        self.checkpoint = (self.step, dict(self.trained))

    def crash(self):
        self.step, self.trained = self.checkpoint[0], dict(self.checkpoint[1])


class ControllerMachine(RuleBasedStateMachine):
    @initialize(
        in_order=st.booleans(),
        release=st.sampled_from(["at_step", "at_checkpoint"]),
        room=st.sampled_from([None, 0, 2, NUM_SAMPLES]),
    )
    def begin(self, in_order, release, room):
        self.options = {"in_order": in_order, "release": release, "window_slots": WINDOW, "lease_s": LEASE_S}
        self.options |= {"max_attempts": 10**6, "max_crash_attempts": 10**6, "epochs": EPOCHS, "seed": 3}
        self.options["retain"] = room is not None
        self.store, self.features, self.model = InMemoryMetadataStore(), NamedFeatures(room or 0), Model()
        self.newest, self.held, self.late, self.adopted, self.num_calls = {}, [], [], [], 0
        self.all_leases, self.num_deaths = {}, dict.fromkeys(WORKERS, 0)
        self.start(live_workers=())

    def start(self, live_workers):
        self.run = Run(self.store, num_samples=NUM_SAMPLES, features=self.features, **self.options)
        position = Position(len(self.model.trained), self.model.step, self.options["in_order"])
        self.run.controller.resume(position, live_workers=live_workers)
        self.received, self.last = [], ([], 0)

    def name(self, worker):
        return f"{worker}.{self.num_deaths[worker]}"

    @rule(worker=st.sampled_from(WORKERS), n=st.integers(1, 4))
    def lease(self, worker, n):
        worker = self.name(worker)
        if any(lease in self.adopted for name, _, lease in self.held if name == worker):
            return  # a worker asks when it has nothing of an earlier controller left
        self.num_calls += 1
        leases = self.run.lease(n, worker, str(self.num_calls))
        if leases:
            assert self.run.lease(n, worker, str(self.num_calls)) == leases
        for lease in leases:
            assert lease.generation > self.newest.get(lease.task.sample_id, 0)
            self.newest[lease.task.sample_id] = lease.generation
            self.all_leases[lease.task.sample_id, lease.generation] = lease
            self.held.append((worker, self.run.now + LEASE_S, lease))

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def commit(self, data):
        _, deadline, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        (accepted,) = self.run.commit([lease])
        assert accepted == (self.run.now < deadline)
        self.late += [] if accepted else [lease]

    @rule(data=st.data())
    @precondition(lambda self: self.late)
    def commit_of_a_lost_attempt(self, data):
        assert self.run.commit([data.draw(st.sampled_from(self.late))]) == [False]

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def fail(self, data):
        worker, _, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.run.controller.fail(worker, lease.task.sample_id, lease.generation, "odd")

    @rule(worker=st.sampled_from(WORKERS), reason=st.sampled_from([None, "killed"]), stored=st.booleans())
    def worker_goes(self, worker, reason, stored):
        """A worker that died comes back with another name."""
        worker = self.name(worker)
        mine = [item for item in self.held if item[0] == worker]
        if stored:
            self.features.put([(lease.task.sample_id, lease.generation) for _, _, lease in mine])
        self.run.controller.leave(worker, reason)
        if reason is not None:
            assert self.run.controller.lease(worker, 1, 60.0).finished
            self.num_deaths[worker.split(".")[0]] += 1
        self.held = [item for item in self.held if item[0] != worker]
        self.late += [lease for _, _, lease in mine]

    @rule(seconds=st.sampled_from([1.0, 6.0, LEASE_S]))
    def time_passes(self, seconds):
        self.run.now += seconds

    @rule(n=st.integers(1, 3), repeat=st.booleans())
    def train(self, n, repeat):
        self.received += self.run.poll()
        refs, self.received = self.received[:n], self.received[n:]
        if not refs:
            return
        assert all(self.features.live([ref.ref for ref in refs]))
        self.model.train(self.run.numbers(refs))
        for _ in range(1 + repeat):
            self.run.train(refs, self.model.step)
        self.last = refs, self.model.step

    @rule()
    @precondition(lambda self: self.last[0])
    def ack_of_another_step(self):
        with pytest.raises(InvalidTransition):
            self.run.train(self.last[0], self.last[1] + 1)

    @rule(told=st.booleans())
    def save(self, told):
        """``told`` False: the process dies before the ledger hears of the checkpoint."""
        self.model.save()
        if told:
            self.run.controller.checkpointed(self.model.step)

    @rule(living=st.sets(st.sampled_from(WORKERS)), lost=st.integers(0, 3), unanswered=st.booleans())
    def trainer_dies(self, living, lost, unanswered):
        """Some features are gone too. ``unanswered``: no worker has heard what it was leased."""
        living = {self.name(worker) for worker in living}
        self.model.crash()
        self.features.abort(self.features.stored()[:lost])
        self.start(living)
        leased = self.run.controller._window.leases.values()
        self.adopted = [self.all_leases[sample.sample_id, sample.generation] for sample in leased]
        self.late += [lease for _, _, lease in self.held if lease not in self.adopted]
        held = [(worker, LEASE_S, lease) for worker, _, lease in self.held if lease in self.adopted]
        self.held = [] if unanswered else held

    @invariant()
    def the_ledger_says_what_the_weights_contain(self):
        if not hasattr(self, "model"):
            return
        model, counts = self.model, self.store.counts()
        assert {slot: self.store.slot_step(slot) for slot in model.trained} == model.trained
        assert counts.num_slots_trained == len(model.trained)
        if self.options["in_order"]:
            assert sorted(model.trained) == list(range(len(model.trained)))
        stored = self.features.stored()
        assert counts.num_committed == sum(map(self.is_committed, stored))
        summary = self.run.controller.summary()
        assert summary["num_slots_trained"] == len(model.trained)
        assert summary["num_leased"] == counts.num_leased
        assert summary["num_resident"] + summary["num_retained"] == counts.num_committed
        in_flight = self.run.controller._window.in_flight.values()
        assert summary["resident_bytes"] == sum(sample.num_bytes for sample in in_flight)

    def is_committed(self, pair):
        sample_id, generation = pair
        record = self.store.sample(int(sample_id[1:]))
        return record.ref is not None and record.generation == generation


TestController = pytest.mark.timeout(120)(ControllerMachine.TestCase)
TestController.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
