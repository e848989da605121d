"""OfflineManifestReader: the engine of a run over features that were captured earlier. It loads no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.offline import FeatureSet
from specforge.errors import DataError, EngineError
from specforge.inference.engine import CapturedSample, Generation


class OfflineManifestReader:
    """Implements ``TargetEngine.capture`` with the files of a feature set, mapped and not copied."""

    def __init__(self, target: TargetInfo, features: FeatureSet) -> None:
        self.info = target
        self._features = features

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
        """What the target gave for each task, in task order; the tensors are private mappings of the files.

        Raises :class:`EngineError` for another spec than that of the capture and for files that cannot be reached.
        What concerns one task alone is its failure: a :class:`DataError` with the reason that was recorded where it
        could not be captured, or where the set does not have it, and ``CorruptFeature`` for a damaged file.
        """
        if spec.fingerprint != self._features.manifest.fingerprint:
            raise EngineError(
                f"{self._features.directory} was captured as {self._features.manifest.spec}, asked for was {spec}"
            )
        for task in tasks:
            try:
                tensors = self._features.read(task.sample_id)
            except OSError as error:
                raise EngineError(
                    f"{error.filename or self._features.directory} cannot be read ({error.strerror}); check that the "
                    "feature set is still mounted and complete"
                ) from error
            if len(tensors["input_ids"]) != task.num_tokens:
                raise DataError(
                    f"sample {task.sample_id!r} has {task.num_tokens} tokens, its features have "
                    f"{len(tensors['input_ids'])}; capture again"
                )
            yield CapturedSample(task.sample_id, dict(tensors))

    def generate(self, prompts: Sequence[Sequence[int]], options: Generate) -> list[Generation]:  # noqa: ARG002
        """Not possible: :class:`EngineError`."""
        raise EngineError("a run over data.features has no target that could generate; give data.path instead")

    def close(self) -> None:
        """The files are mapped one by one, and held by their tensors alone."""
