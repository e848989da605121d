"""CaptureService: requests in, tickets out. One thread owns the engine and works on what waits."""

from __future__ import annotations

import logging
import threading
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
from specforge.inference.servers.base import expected_features
from specforge.inference.serving.jobs import CaptureJob, GenerateJob, Job, JobQueue, Refused
from specforge.inference.serving.settings import ServingSettings
from specforge.inference.serving.sinks import OpenSink, OpenSinks
from specforge.inference.serving.writers import StoreWriter, Writer

_LOG = logging.getLogger(__name__)

TICK_S = 30.0
"""How often an idle server looks for sinks that nobody uses."""


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
        self._sinks = OpenSinks(settings, engine.info, self._queue.wake)
        self._inline = Writer("inline features", self._queue.wake)
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
        """What waits is refused, the running forward ends and is answered. False: it did not end in time."""
        for job in self._queue.close():
            job.refuse(Refused("busy", "the server is stopping"))
        if self._thread.is_alive():
            self._thread.join(self._settings.grace_s)
        self._inline.stop(self._settings.grace_s)
        self._sinks.leave_all()
        return not self._thread.is_alive()

    def capture(self, request: CaptureRequest) -> Ticket:
        """Raises :class:`Refused`."""
        self._check_revision(request.target_revision)
        self._check_layers(request.spec)
        ticket = self._admitted(self._inline_bytes(request))
        try:
            if isinstance(request.sink, InlineSink):
                jobs = new = [CaptureJob(item, request.spec, self._inline) for item in request.items]
            else:
                ticket.sink = self._sinks.acquire(request.sink)
                jobs, new = ticket.sink.writer.claim(request.items, request.spec)
            ticket.jobs += jobs
            self._enqueue([job for job in new if self._fits(job)])
        except BaseException:
            self.abandon(ticket)
            self.release(ticket)
            raise
        return ticket

    def generate(self, request: GenerateRequest) -> Ticket:
        """Raises :class:`Refused`."""
        self._check_revision(request.target_revision)
        for prompt in request.prompts:
            self._check_prompt(prompt, request.generate.max_new_tokens)
        ticket = self._admitted(0)
        ticket.jobs += [GenerateJob(prompt, request.generate) for prompt in request.prompts]
        try:
            self._enqueue(ticket.jobs)
        except BaseException:
            self.release(ticket)
            raise
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
        return sum(expected_features(request.spec, width, len(item.input_ids))[1] for item in request.items)

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
        while (batch := self._queue.take(TICK_S, self._sinks.close_idle)) is not None:
            self._work_on(batch)
            if self.failed is not None:
                for job in self._queue.close():
                    job.refuse(self._stopped())
                self._on_failed()

    def _work_on(self, batch: list[Job]) -> None:
        try:
            self._work(batch)
        except ENGINE_WIDE as error:
            _LOG.exception("the target engine failed")
            if isinstance(error, torch.AcceleratorError):
                self.failed = error  # the context of the device is gone, and nothing brings it back
            for job in batch:
                job.refuse(Refused("engine", f"{type(error).__name__}: {error}"))
        except Exception as error:  # noqa: BLE001 - whatever one prompt does to the engine is that prompt's failure
            if len(batch) > 1:
                for job in batch:
                    self._work_on([job])
            else:
                _fail(batch[0], error)

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
            responses = self._engine.generate([job.prompt for job in prompts], prompts[0].options)
            for prompt, response in zip(prompts, responses, strict=True):
                prompt.answer(response.token_ids, stopped=response.stopped)


def _fail(job: Job, error: Exception) -> None:
    reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    if isinstance(job, CaptureJob):
        job.owner.end(job, job.failed("prompt", reason[:2000]))
    else:
        job.refuse(Refused("request" if isinstance(error, DataError) else "engine", reason[:2000]))
