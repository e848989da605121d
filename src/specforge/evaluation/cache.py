"""EvalCache: the features of evaluation samples, captured once and read by every run that evaluates on the same.

    DIR/
        <key>/key.json        what the features depend on, in clear: why another run did not find them
        <key>/set/            the features, a feature set (:mod:`specforge.data_plane.offline`)
        <key>.lock            held shared while an entry is checked, alone while it is produced; stays
        <key>.partial/        being produced, or left by a process that died: removed by the next that produces

``<key>`` is the start of the SHA-256 of ``key.json``. An entry appears by a rename, complete and on the disk. To clear
the cache, delete the directory, or entries of it: a plain directory that nothing else refers to. Runs that evaluate
from an entry at that moment fail.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.codec import Form
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.offline import FeatureSet, check_files, check_prompts
from specforge.data_plane.safetensors_file import sync_directory
from specforge.errors import ContractError, DataError
from specforge.prompts.recorded import recorded_lines

_LOG = logging.getLogger(__name__)

FORMAT_VERSION = 1
KEY_FILE = "key.json"
SET_DIR = "set"
TEMPLATE_FILE = "chat_template.jinja"
_KEY_CHARS = 32
_LOCK, _PARTIAL = ".lock", ".partial"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class EvalKey:
    """Everything that can change the features of evaluation samples; a path is not among it.

    * ``data_sha256``: of the tokenized samples (ids, loss spans), ``num_samples`` of them, for the reader
    * ``target_revision``: content hash of the target; ``target_dtype`` and ``device_type``: what it computes in and on
    * ``tokenizer_sha256``, ``chat_template_sha256``: of the files' contents, empty where there is none
    * ``spec``: what is captured; ``max_length``: where samples were cut, in tokens
    """

    data_sha256: str
    num_samples: int
    target_revision: str
    target_dtype: str
    device_type: str
    tokenizer_sha256: str
    chat_template_sha256: str
    spec: CaptureSpec
    max_length: int
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """Directory of the entry."""
        return hashlib.sha256(key_text(self)).hexdigest()[:_KEY_CHARS]


_KEY: Form[EvalKey] = Form(EvalKey)


def key_text(key: EvalKey) -> bytes:
    """Content of ``key.json``; equal keys have equal bytes."""
    return _KEY.write(key) + b"\n"


def data_sha256(tasks: Sequence[PromptTask]) -> str:
    """SHA-256 over tokens and loss spans in order: that of the prompts of a feature set of ``tasks``."""
    return hashlib.sha256(recorded_lines(tasks)).hexdigest()


def chat_template_sha256(target: TargetInfo, chosen: Path | None) -> str:
    """SHA-256 of the template file ``chosen``, else of the one beside the target; empty without either.

    A template inside the tokenizer's own configuration is part of the tokenizer's hash.
    """
    path = chosen or Path(target.path) / TEMPLATE_FILE
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        if chosen is None and isinstance(error, FileNotFoundError):
            return ""
        raise DataError(f"{path}: the chat template cannot be read ({error.strerror})") from None


def default_directory() -> Path:
    """``specforge/eval`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specforge" / "eval"


class EvalCache:
    """Feature sets by :class:`EvalKey` in ``directory``, for any number of processes at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def features(self, key: EvalKey, produce: Callable[[Path], object]) -> FeatureSet:
        """The features of ``key``, every file checked against its checksum.

        Where there are none, or damaged ones, ``produce`` writes a complete feature set into the directory that it is
        given. One process at a time does; the others wait for it, and the next one takes over should it die. What
        ``produce`` raises is raised here, and leaves nothing behind.
        """
        with self._locked(key.name, fcntl.LOCK_SH):
            found = self._checked(key)
        if found is not None:
            return found
        with self._locked(key.name, fcntl.LOCK_EX):
            return self._checked(key) or self._produced(key, produce)

    def _checked(self, key: EvalKey) -> FeatureSet | None:
        """The entry of ``key``; ``None`` where there is none that can be used."""
        entry = self.directory / key.name
        if not entry.exists():
            return None
        try:
            features = FeatureSet(entry / SET_DIR)
            _check_is_of(features, key)
            _check_key(entry / KEY_FILE, key)
            check_prompts(features.directory, features.manifest)
            check_files(features.directory, features.entries.values(), checksums=True)
        except (DataError, OSError) as error:
            _LOG.warning("the evaluation features in %s are damaged and captured again: %s", entry, error)
            return None
        return features

    def _produced(self, key: EvalKey, produce: Callable[[Path], object]) -> FeatureSet:
        """Captures the entry of ``key``, in place of a damaged one. Its lock is held."""
        entry, partial = self.directory / key.name, self.directory / (key.name + _PARTIAL)
        _LOG.info("%s has no evaluation features of this target and data yet%s", self.directory, self._nearest(key))
        self._collect(key.name)
        try:
            partial.mkdir(mode=0o700)
            produce(partial / SET_DIR)
            try:
                _check_is_of(FeatureSet(partial / SET_DIR), key)
            except DataError as error:
                raise ContractError(f"what was captured is not what was asked for: {error}") from error
            _write_synced(partial / KEY_FILE, key_text(key))
            if entry.exists():
                self._discard(entry)
            partial.rename(entry)
            sync_directory(self.directory)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise DataError(
                    f"{self.directory}: {error.strerror}, in the middle of the features of {key.num_samples} "
                    "evaluation samples; make room, choose another directory for the cache, or evaluate fewer samples"
                ) from error
            raise
        return FeatureSet(entry / SET_DIR)

    def _discard(self, entry: Path) -> None:
        """Remove ``entry``, whose lock is held; it is gone as a whole before its files are."""
        discarded = entry.with_name(f"{entry.name}.discarded{_PARTIAL}")
        shutil.rmtree(discarded, ignore_errors=True)
        entry.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)

    def _collect(self, own: str) -> None:
        """Remove what processes that died left of entries that nobody is producing."""
        for partial in self.directory.glob(f"*{_PARTIAL}"):
            name = partial.name.partition(".")[0]
            if name == own:
                shutil.rmtree(partial, ignore_errors=True)
                continue
            descriptor = self._open_lock(name)
            try:
                if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(descriptor)

    def _nearest(self, key: EvalKey) -> str:
        """In which fields the most similar entry differs, for the log."""
        ours, found = asdict(key), []
        for file in sorted(self.directory.glob(f"*/{KEY_FILE}")):
            with contextlib.suppress(OSError, ContractError):
                theirs = asdict(_KEY.read(file.read_bytes()))
                found.append(([name for name in ours if ours[name] != theirs[name]], file.parent.name))
        if not found:
            return ""
        fields, name = min(found, key=lambda it: len(it[0]))
        return f"; the most similar ones, {name}, differ in {', '.join(fields)}" if fields else ""

    @contextlib.contextmanager
    def _locked(self, name: str, kind: int) -> Iterator[None]:
        """Hold the lock of an entry, shared or alone. It goes with the process that holds it."""
        while True:
            descriptor = self._open_lock(name)
            try:
                if not _flock(descriptor, kind | fcntl.LOCK_NB):
                    _LOG.info("waiting for another process that works on %s", self.directory / name)
                    _flock(descriptor, kind)
                if self._is_lock(name, descriptor):
                    yield
                    return
            finally:
                os.close(descriptor)

    def _open_lock(self, name: str) -> int:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(self.directory / (name + _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataError(
                f"{self.directory} cannot be the cache of evaluation features ({error.strerror}); choose a directory "
                "that can be written"
            ) from None

    def _is_lock(self, name: str, descriptor: int) -> bool:
        """Whether the file is still the lock: the cache may have been cleared while this process waited for it."""
        try:
            return os.path.samestat(os.fstat(descriptor), (self.directory / (name + _LOCK)).stat())
        except FileNotFoundError:
            return False


def _check_key(file: Path, key: EvalKey) -> None:
    if file.read_bytes() != key_text(key):
        raise DataError(f"{file} is not what it was when the features were captured")


def _check_is_of(features: FeatureSet, key: EvalKey) -> None:
    manifest = features.manifest
    for what, got, expected in (
        ("target revision", manifest.target_revision, key.target_revision),
        ("number format of the target", manifest.target_dtype, key.target_dtype),
        ("capture spec", manifest.spec, key.spec),
        ("SHA-256 of the samples", manifest.prompts_sha256, key.data_sha256),
        ("number of samples", manifest.num_prompts, key.num_samples),
    ):
        if got != expected:
            raise DataError(f"{features.directory}: expected the {what} {expected}, got {got}")


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    return True


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)
