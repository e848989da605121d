"""A capture server in this process around a target that counts its forwards and can be held up."""

import contextlib
import threading

import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CaptureItem, CaptureRequest, InlineSink, SharedMemorySink
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.data_plane.tensors import materialised
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.serving.jobs import when_all

SPEC = CaptureSpec((0, 2), True)
WAIT_S = 60.0


class HeldEngine(HFTargetEngine):
    """``batches``: the sample ids of every forward. Inside ``held`` forwards wait; ``begun`` says that one does."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.batches = []
        self.prompts = []
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()

    def capture_together(self, tasks, spec):
        self.batches.append([task.sample_id for task in tasks])
        self._hold()
        return super().capture_together(tasks, spec)

    def generate(self, prompts, options, between=lambda: None):
        self.prompts.append(list(prompts))
        self._hold()
        return super().generate(prompts, options, between)

    @contextlib.contextmanager
    def held(self):
        """Inside, forwards wait."""
        self.begun.clear()
        self.go.clear()
        try:
            yield
        finally:
            self.go.set()

    def _hold(self):
        self.begun.set()
        assert self.go.wait(WAIT_S)


def tokens(length, seed=0):
    return tuple(3 + (7 * place + 11 * seed + place * place) % 60 for place in range(length))


def item(name, length=10, generation=1):
    return CaptureItem(name, generation, tokens(length, seed=sum(map(ord, name))))


def request(*items, sink=None, spec=SPEC, revision=None):
    return CaptureRequest(tuple(items), spec, InlineSink() if sink is None else sink, revision)


def in_process(engine, one, spec=SPEC):
    """The features of an item as a run in one process has them."""
    (sample,) = HFTargetEngine.capture(engine, [PromptTask(one.sample_id, 0, one.input_ids, ())], spec)
    return {name: materialised(source) for name, source in sample.tensors.items()}


def arena(run_id, capacity_bytes=4 << 20):
    return SharedMemorySink(run_id, capacity_bytes, 64)


def same_bits(got, expected):
    return got.keys() == expected.keys() and all(
        got[name].dtype == expected[name].dtype and bytes(_raw(got[name])) == bytes(_raw(expected[name]))
        for name in expected
    )


def _raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


def list_of(sink):
    """What is readable of the run, in the arenas that are there."""
    with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as store:
        return store.stored()


def done(service, ticket):
    """The reply and the inline features."""
    when_all(ticket.jobs).result(WAIT_S)
    try:
        return service.captured(ticket)
    finally:
        service.release(ticket)


def captured(service, asked):
    return done(service, service.capture(asked))
