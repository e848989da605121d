"""Event files for TensorBoard. The only file that imports tensorboardX, which defines their records.

Its ``SummaryWriter`` is not used: that one writes from a thread, which a full disk ends silently, and then the run
waits forever for a place in the thread's queue. Here a record is one write, and its error is raised where it is made.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge.errors import MissingExtraError
from specforge.monitor.naming import Hyperparameter, event_text, tracked_name


class TensorBoardMonitor:
    """Writes one new event file into ``directory``; TensorBoard joins those of a run and of its resumptions.

    It makes TensorBoard forget what earlier files say of steps after ``first_step``: the resumed run repeats them.
    Raises ``MissingExtraError``, and ``OSError`` where the file cannot be written.
    """

    def __init__(self, directory: Path, first_step: int, hyperparameters: Mapping[str, Hyperparameter]) -> None:
        try:
            import tensorboardX.summary as summaries  # noqa: PLC0415
            from tensorboardX.proto import event_pb2  # noqa: PLC0415
            from tensorboardX.record_writer import masked_crc32c  # noqa: PLC0415
        except ModuleNotFoundError:
            raise MissingExtraError("tensorboardX", "tensorboard") from None
        self._events, self._summaries, self._crc = event_pb2, summaries, masked_crc32c
        self._step = first_step
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # TensorBoard reads the files of a directory in the order of their names: first the second, then the rest
        now = time.time_ns()
        path = directory / f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{now}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        try:
            self._begin(hyperparameters)
        except BaseException:
            self._file.close()
            raise

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._step = step
        value = self._summaries.Summary.Value
        values = [value(tag=tracked_name(name), simple_value=scalar) for name, scalar in scalars.items()]
        self._write(step=step, summary=self._summaries.Summary(value=values))

    def event(self, name: str, **fields: str | float | bool | None) -> None:
        """As a text, at the step that it names or else at the last one that was logged."""
        step = fields.get("step")
        text = self._summaries.text(f"events/{name}", event_text(fields))
        self._write(step=step if isinstance(step, int) else self._step, summary=text)

    def close(self) -> None:
        self._file.close()

    def _begin(self, hyperparameters: Mapping[str, Hyperparameter]) -> None:
        self._write(file_version="brain.Event:2")
        started = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=self._step + 1, session_log=started)
        known = {name: value for name, value in hyperparameters.items() if value is not None}
        experiment, session, _ = self._summaries.hparams(known, {})
        self._write(summary=experiment)
        self._write(summary=session)

    def _write(self, **content: Any) -> None:
        """One TFRecord: length (u64), its checksum, the event, its checksum; little-endian, in a single write."""
        event = self._events.Event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        record = b"".join((length, struct.pack("<I", self._crc(length)), event, struct.pack("<I", self._crc(event))))
        written = self._file.write(record)
        if written != len(record):
            raise OSError(errno.ENOSPC, f"only {written} of {len(record)} bytes could be written", self._file.name)
