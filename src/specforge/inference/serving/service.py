"""CaptureService: requests in, tickets out. One thread owns the engine and works on what waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers

from specforge import __version__
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import (
    PROTOCOL,
    CaptureReply,
    CaptureRequest,
    CloseSink,
    GenerateReply,
    GenerateRequest,
    InlineSink,
    ServerInfo,
)
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.tensors import Source
from specforge.errors import DataError
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.rollout import ENGINE_WIDE
from specforge.inference.serving.jobs import CaptureJob, GenerateJob, Job, JobQueue, Refused
from specforge.inference.serving.settings import ServingSettings
from specforge.inference.serving.sinks import OPEN_S, OpenSink, OpenSinks
from specforge.inference.serving.writers import StoreWriter, Writer

_LOG = logging.getLogger(__name__)

TICK_S = 30.0
"""How often an idle server looks for sinks that nobody uses."""
DRAIN_S = 30.0
"""How long features that are on the device may take to leave it."""
OURS = 0.9
"""The share of the device's memory which, where a server has it, makes a sample too large that does not fit."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that was let in. ``inline_bytes`` are reserved for it, ``sink`` is held open, until it is released.

    ``is_handed_on``: its answer, which is still to be sent, releases it.
    """

    jobs: list[Job]
    inline_bytes: int = 0
    sink: OpenSink | None = None
    is_handed_on: bool = False
    is_released: bool = False


class CaptureService:
    """Serves ``engine`` between ``start`` and ``stop``. ``on_failed`` is called when the engine is lost for good, the
    reason in ``failed``.
    """

    def __init__(
        self, engine: HFTargetEngine, settings: ServingSettings, on_failed: Callable[[], None] = lambda: None
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._on_failed = on_failed
        self.failed: Exception | None = None
        is_strict = settings.order == "strict"
        self._queue = JobQueue(0 if is_strict else settings.max_batch_tokens)
        self._sinks = OpenSinks(settings, engine.info, self._queue.wake, self._lose)
        self._inline = Writer("inline features", self._queue.wake, self._lose)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._num_requests = 0
        self._num_inline_bytes = 0
        self._thread = threading.Thread(target=self._run, name="target", daemon=True)
        info = engine.info
        self.info = ServerInfo(
            protocol=PROTOCOL,
            engine="specforge",
            engine_version=f"{__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
            target_revision=info.revision,
            num_layers=info.num_layers,
            hidden_size=info.hidden_size,
            vocab_size=info.vocab_size,
            dtype=str(engine.dtype).removeprefix("torch."),
            layers=None,
            last_hidden=True,
            sinks=self._sinks.kinds,
            strict=is_strict,
            max_tokens=info.max_position_embeddings,
            max_in_flight=settings.max_queued,
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> bool:
        """What waits is refused, and a response that is not finished; the running forward ends and is answered. False:
        it did not end in time.
        """
        self._stopping.set()
        for job in self._queue.close():
            job.refuse(Refused("busy", "the server is stopping"))
        if self._thread.is_alive():
            self._thread.join(self._settings.grace_s)
        self._inline.stop(self._settings.grace_s)
        self._sinks.leave_all()
        return not self._thread.is_alive()

    def capture(self, request: CaptureRequest) -> Ticket:
        """Admit and begin. Waits for the sink to be opened. Raises :class:`Refused`."""
        ticket = self.admit(request)
        try:
            self.begin(ticket, request)
        except BaseException:
            self.abandon(ticket)
            self.release(ticket)
            raise
        return ticket

    def admit(self, request: CaptureRequest, asked_at: float | None = None) -> Ticket:
        """A ticket without jobs. ``asked_at``: when the request came, by the monotonic clock; ``None``: now. Raises
        :class:`Refused`.
        """
        asked_at = time.monotonic() if asked_at is None else asked_at
        self._check_revision(request.target_revision)
        self._check_layers(request.spec)
        ticket = self._admitted(self._inline_bytes(request))
        if not isinstance(request.sink, InlineSink):
            try:
                ticket.sink = self._sinks.acquire(request.sink, asked_at)
            except BaseException:
                self.release(ticket)
                raise
        return ticket

    def begin(self, ticket: Ticket, request: CaptureRequest) -> None:
        """Queue what ``request`` asks for. Raises :class:`Refused`; then the ticket is still to be released."""
        if ticket.sink is None:
            jobs = new = [CaptureJob(item, request.spec, self._inline) for item in request.items]
        else:
            jobs, new = ticket.sink.wait(OPEN_S).claim(request.items, request.spec)
        ticket.jobs += jobs
        self._enqueue([job for job in new if self._fits(job)])

    def generate(self, request: GenerateRequest) -> Ticket:
        """Raises :class:`Refused`."""
        self._check_revision(request.target_revision)
        for prompt in request.prompts:
            self._check_prompt(prompt, request.generate.max_new_tokens)
        ticket = self._admitted(0)
        ticket.jobs += [GenerateJob(prompt, request.generate) for prompt in request.prompts]
        self._enqueue(ticket.jobs)
        return ticket

    def captured(self, ticket: Ticket) -> tuple[CaptureReply, list[Mapping[str, Source] | None]]:
        """The reply to a capture whose jobs are done, and the inline features. Raises :class:`Refused`."""
        finished = [job.done.result() for job in ticket.jobs if isinstance(job, CaptureJob)]
        items = tuple(one.item for one in finished)
        return CaptureReply(self.info.target_revision, items), [one.tensors for one in finished]

    def generated(self, ticket: Ticket) -> GenerateReply:
        """The reply to a generation whose jobs are done. Raises :class:`Refused`."""
        items = tuple(job.done.result() for job in ticket.jobs if isinstance(job, GenerateJob))
        return GenerateReply(self.info.target_revision, items)

    def abandon(self, ticket: Ticket) -> None:
        """Nobody waits for the answer any more: what nobody else wants is not worked on."""
        for job in ticket.jobs:
            if isinstance(job, CaptureJob) and isinstance(job.owner, StoreWriter):
                job.owner.give_up(job, self._queue.remove)
            else:
                if isinstance(job, CaptureJob):
                    job.num_waiting = 0
                else:
                    job.is_wanted = False
                self._queue.remove(job)

    def release(self, ticket: Ticket) -> None:
        """What was held for the request is free again. Idempotent."""
        with self._lock:
            if ticket.is_released:
                return
            ticket.is_released = True
            self._num_requests -= 1
            self._num_inline_bytes -= ticket.inline_bytes
        if ticket.sink is not None:
            self._sinks.release(ticket.sink)

    def close_sink(self, request: CloseSink) -> None:
        if not isinstance(request.sink, InlineSink):
            self._sinks.close(request.sink)

    def _check_revision(self, revision: str | None) -> None:
        if revision not in (None, self.info.target_revision):
            raise Refused(
                "model",
                f"the request is for the target revision {revision:.16}, this server has "
                f"{self.info.target_revision:.16} of {self._engine.info.path}; start it with those weights",
            )

    def _check_layers(self, spec: CaptureSpec) -> None:
        wrong = [layer for layer in spec.aux_layers if layer >= self.info.num_layers]
        if wrong:
            raise Refused(
                "model",
                f"the request asks for layer {wrong[0]}, and this target has layers 0 to {self.info.num_layers - 1}",
            )

    def _check_prompt(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        if not prompt or max(prompt) >= self.info.vocab_size:
            raise Refused(
                "request",
                f"expected prompts of at least one token, with ids below {self.info.vocab_size}, got "
                f"{len(prompt)} tokens with ids up to {max(prompt, default=0)}",
            )
        if len(prompt) + max_new_tokens > self.info.max_tokens:
            raise Refused(
                "request",
                f"a prompt of {len(prompt)} tokens and up to {max_new_tokens} new ones are more than the "
                f"{self.info.max_tokens} of the target",
            )

    def _fits(self, job: CaptureJob) -> bool:
        """Whether the target can read the sample; one that is too long has failed with this."""
        if job.num_tokens <= self.info.max_tokens:
            return True
        reason = f"a sample of {job.num_tokens} tokens is longer than the target reads, {self.info.max_tokens}"
        job.owner.end(job, job.failed("prompt", reason))
        return False

    def _inline_bytes(self, request: CaptureRequest) -> int:
        if not isinstance(request.sink, InlineSink):
            return 0
        width = self.info.hidden_size
        return sum(request.spec.layout(width, len(item.input_ids))[1] for item in request.items)

    def _admitted(self, inline_bytes: int) -> Ticket:
        limits = self._settings
        if inline_bytes > limits.max_inline_bytes:
            raise Refused(
                "request",
                f"an answer with {inline_bytes:,} bytes of features is larger than this server's "
                f"{limits.max_inline_bytes:,} (--max-inline-bytes); ask for fewer samples at a time",
            )
        with self._lock:
            if self._num_requests >= limits.max_queued:
                raise Refused("busy", f"{self._num_requests} requests wait already (--max-queued); send it again later")
            if self._num_inline_bytes + inline_bytes > limits.max_inline_bytes:
                raise Refused(
                    "busy",
                    f"answers with {self._num_inline_bytes:,} bytes of features are on their way "
                    "(--max-inline-bytes); send it again later",
                )
            self._num_requests += 1
            self._num_inline_bytes += inline_bytes
        return Ticket([], inline_bytes)

    def _enqueue(self, jobs: Sequence[Job]) -> None:
        if not self._queue.put(jobs):
            refused = self._stopped()
            for job in jobs:
                job.refuse(refused)

    def _stopped(self) -> Refused:
        if self.failed is not None:
            return Refused("engine", f"the target engine is lost: {self.failed}")
        return Refused("busy", "the server is stopping")

    def _run(self) -> None:
        batch: list[Job] = []
        try:
            while (taken := self._queue.take(TICK_S, self._sinks.close_idle)) is not None:
                batch = taken
                self._work_on(batch)
                batch = []  # an idle server holds nobody's features
        except Exception as error:  # noqa: BLE001 - the end of a thread: the server says so and ends
            _LOG.exception("the thread of the target engine ended")
            self._lose(error)
            for job in batch:
                job.refuse(self._stopped())

    def _lose(self, error: Exception) -> None:
        """The server is of no more use: all that wait are told, and whoever started it."""
        with self._lock:
            if self.failed is not None:
                return
            self.failed = error
        refused = self._stopped()
        for job in self._queue.close():
            job.refuse(refused)
        for writer in (self._inline, *self._sinks.writers()):
            writer.refuse_all(refused)
        self._on_failed()

    def _work_on(self, batch: list[Job], *, is_alone: bool = False) -> None:
        """``is_alone``: nothing else of this server is on the device."""
        retried: list[Job] = []
        needs_room = False
        try:
            self._work(batch)
        except Refused as refused:
            _refuse(batch, refused)
        except ENGINE_WIDE as error:
            _LOG.exception("the target engine failed")
            _refuse(batch, Refused("engine", f"{type(error).__name__}: {error}"))
            if isinstance(error, torch.AcceleratorError):
                self._lose(error)  # the context of the device is gone, and nothing brings it back
        except Exception as error:  # noqa: BLE001 - whatever one prompt does to the engine is that prompt's failure
            needs_room = isinstance(error, torch.OutOfMemoryError)
            if len(batch) > 1 or (needs_room and not is_alone):
                retried = batch
            elif needs_room and self._others_use_the_device():
                _refuse(batch, Refused("engine", f"others use the device's memory: {error}"))
            else:
                _fail(batch[0], error)
        # outside of the handlers, which hold what the forward had on the device
        for job in retried:
            if needs_room and not self._has_emptied():
                job.refuse(Refused("engine", "the device is out of memory, and the features on it do not leave it"))
            else:
                self._work_on([job], is_alone=needs_room)

    def _has_emptied(self) -> bool:
        """Waits until no features are on the device any more."""
        deadline = time.monotonic() + DRAIN_S
        writers = (self._inline, *self._sinks.writers())
        is_empty = all(writer.drained(max(deadline - time.monotonic(), 0.0)) for writer in writers)
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()
        return is_empty

    def _others_use_the_device(self) -> bool:
        device = self._engine.device
        if device.type != "cuda":
            return False
        free_bytes, num_bytes = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device) < OURS * num_bytes

    def _work(self, batch: list[Job]) -> None:
        captures = [job for job in batch if isinstance(job, CaptureJob)]
        prompts = [job for job in batch if isinstance(job, GenerateJob)]
        if captures:
            tasks = [PromptTask(job.item.sample_id, 0, job.item.input_ids, ()) for job in captures]
            samples = self._engine.capture_together(tasks, captures[0].spec)
            for job, sample in zip(captures, samples, strict=True):
                assert isinstance(job.owner, Writer)
                job.owner.hand_over(job, sample)
        if prompts:
            responses = self._engine.generate(
                [job.prompt for job in prompts], prompts[0].options, lambda: self._check_wanted(prompts)
            )
            for prompt, response in zip(prompts, responses, strict=True):
                prompt.answer(response.token_ids, stopped=response.stopped)

    def _check_wanted(self, prompts: Sequence[GenerateJob]) -> None:
        """Raises :class:`Refused` where nobody will get the responses."""
        if self._stopping.is_set() or self.failed is not None:
            raise self._stopped()
        if not any(prompt.is_wanted for prompt in prompts):
            raise Refused("busy", "nobody waits for the response any more")


def _refuse(batch: Sequence[Job], refused: Refused) -> None:
    for job in batch:
        job.refuse(refused)


def _fail(job: Job, error: Exception) -> None:
    reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    if isinstance(job, CaptureJob):
        job.owner.end(job, job.failed("prompt", reason[:2000]))
    else:
        job.refuse(Refused("request" if isinstance(error, DataError) else "engine", reason[:2000]))
