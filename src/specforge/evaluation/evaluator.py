"""Evaluator: the numbers of a draft on held-out samples, from features that were captured before.

The micro-batches are decided once, over all samples, and dealt to the ranks whole. Their sums are gathered and added in
one order in fp64. So the numbers do not depend on the number of ranks at all, and on the size of micro-batches only by
the rounding of a matrix product.

Legend: T packed tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, Runs, StepContext, StepOutput, TargetTables
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.data_plane.assembly import FeatureWidths, assemble, feature_widths, outline
from specforge.data_plane.encoding import not_finite
from specforge.data_plane.offline import FeatureSet, StoredSample
from specforge.data_plane.packing import pack_window
from specforge.errors import DataError, FeatureStoreError
from specforge.training.metrics import StepSums

_LOG = logging.getLogger(__name__)

PREFIX = "eval/"

_CONTEXT = StepContext(global_step=1, total_steps=1, seed=0, exhaustive=True)
"""The end of every schedule: losses of different steps are the same function of the draft."""
_SOUND = 0.0
"""Instead of the number of a sample, from 1 on, that could not be used."""


class Ranks(Protocol):
    """The processes that evaluate together. ``gather`` is a collective: every rank calls it, with as many values."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, values: list[float]) -> list[list[float]]:
        """The fp64 values of every rank, in the order of ranks, the same on all of them."""
        ...


@dataclass(frozen=True, slots=True)
class SingleRank:
    """One process that evaluates alone."""

    rank: int = 0
    size: int = 1

    def gather(self, values: list[float]) -> list[list[float]]:
        return [values]


@dataclass(frozen=True, slots=True)
class EvaluatorSettings:
    """``micro_batch_tokens``: tokens of a forward. ``compute_dtype``: the autocast type, as in training."""

    micro_batch_tokens: int
    device: str = "cpu"
    compute_dtype: torch.dtype = torch.float32


class Evaluator:
    """One pass over all samples of ``features``, a micro-batch of them in memory at a time.

    Every rank has the same ``features`` and ``settings``, and calls :meth:`run` at the same steps. A :class:`DataError`
    where no sample gives the algorithm a token to evaluate.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        tables: TargetTables,
        features: FeatureSet,
        settings: EvaluatorSettings,
        ranks: Ranks | None = None,
    ) -> None:
        self._algorithm = algorithm
        self._tables = tables
        self._features = features
        self._settings = settings
        self._ranks = ranks or SingleRank()
        self._device = torch.device(settings.device)
        self._items = _stored(features)
        if features.manifest.num_failed:
            _LOG.warning(
                "%s: %d of %d evaluation samples could not be captured and are left out",
                features.directory, features.manifest.num_failed, features.manifest.num_prompts,
            )  # fmt: skip
        self._widths = _common_widths(features, self._items)
        self._bins = pack_window([item.ref.num_tokens for item in self._items], settings.micro_batch_tokens)
        self._weight = sum(algorithm.supervised_weight(outline(self._of(it)), _CONTEXT) for it in self._bins)
        if not self._weight:
            raise DataError(
                f"{features.directory}: none of the {len(self._items)} evaluation samples has a token that "
                f"{algorithm.name} is measured at; give samples with longer answers, or raise the longest length if "
                "their answers were cut off"
            )

    @property
    def num_micro_batches(self) -> int:
        """Of all ranks together, empty ones not counted."""
        return len(self._bins)

    def run(self, draft: DraftModel) -> dict[str, float]:
        """Means over all samples; a collective. ``draft`` is left as it was, in training mode or not.

        * ``eval/avg_loss``: loss sum / supervised weight
        * ``eval/avg_acc``, ``eval/per_position_acc_i``: correct / all proposals of greedy drafting, in total and of
          the i-th position
        * ``eval/simulated_acc_len``: 1 + the leading run of correct positions, mean over the rows at which rounds start
          when an answer is decoded (``eval/num_rounds``); 1.0 without a round. The end of an answer ends its last
          round, as a stop token does
        * ``eval/simulated_acc_len_all_rows``, ``eval/product_acc_len``: as training logs them
        * ``eval/num_samples``, ``eval/num_supervised``: rows at which the draft was asked to propose
        * ``eval/<metric>``: the algorithm's own

        A sample that cannot be read, or that is not finite, is a :class:`DataError` on every rank.
        """
        ranks, size = self._ranks, self._ranks.size
        num_turns = -(-len(self._bins) // size)
        measured: list[_Measured] = []
        with _evaluating(draft):
            for turn in range(num_turns):
                number = turn * size + ranks.rank
                measured.append(self._measure(draft, self._bins[number] if number < len(self._bins) else []))
        gathered = ranks.gather([value for it in measured for value in it.values()])
        total = _Measured()
        for number in range(len(self._bins)):
            turn, rank = divmod(number, size)
            values = gathered[rank]
            width = len(values) // num_turns
            one = measured[0].with_values(values[turn * width : (turn + 1) * width])
            if one.unusable != _SOUND:
                raise self._refusal(one.unusable, rank, measured[turn] if rank == ranks.rank else None)
            total.merge(one)
        return self._means(total)

    def _measure(self, draft: DraftModel, places: Sequence[int]) -> _Measured:
        """A micro-batch of the samples at ``places``; of none at all where one of them cannot be used."""
        items = self._of(places)
        samples: list[dict[str, Tensor]] = []
        found = _Measured()
        for place, item in zip(places, items, strict=True):
            try:
                samples.append(self._read(item.ref))
            except DataError as error:  # the others wait in a collective: they must hear of it there
                found = _Measured(unusable=1.0 + place, error=error)
                items, samples = [], []
                break
        batch = assemble(items, samples, self._widths, self._device)
        output = self._forward(draft, batch)
        found.sums.add(output)
        found.rounds, found.committed = rounds_of(output.runs, items)
        return found

    def _forward(self, draft: DraftModel, batch: TrainBatch[Tensor]) -> StepOutput:
        dtype = self._settings.compute_dtype
        with torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32):
            return self._algorithm.forward_loss(draft, self._tables, batch, _CONTEXT)

    def _read(self, ref: SampleRef) -> dict[str, Tensor]:
        """Features of one sample; every fault is a :class:`DataError` that names the file."""
        path = self._features.directory / ref.key
        try:
            sample = self._features.read(ref.sample_id)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); check the disk or the mount") from error
        except FeatureStoreError as error:
            raise DataError(f"{error}; delete {self._features.directory}, it is captured again") from error
        damaged = not_finite(sample)
        if damaged is not None:
            raise DataError(
                f"evaluation sample {ref.sample_id!r} has NaN or infinite values in feature {damaged!r} ({path}): a "
                "number with it would mean nothing. Take the sample out of the evaluation data, or capture in float32 "
                "if its target is out of range of a smaller format"
            )
        return sample

    def _refusal(self, unusable: float, rank: int, own: _Measured | None) -> DataError:
        if own is not None and own.error is not None:
            return own.error
        name = self._items[int(unusable) - 1].ref.sample_id
        return DataError(f"evaluation sample {name!r} cannot be used: see the error of rank {rank}, which read it")

    def _means(self, total: _Measured) -> dict[str, float]:
        scalars = total.sums.scalars(self._weight)
        correct, count = sum(total.sums.correct), sum(total.sums.count)
        found = {
            "avg_loss": scalars.pop("loss"),
            "avg_acc": correct / count if count else 0.0,
            "simulated_acc_len": total.committed / total.rounds if total.rounds else 1.0,
            "simulated_acc_len_all_rows": scalars.pop("simulated_acc_len"),
            "product_acc_len": scalars.pop("product_acc_len"),
            "num_samples": float(len(self._items)),
            "num_supervised": total.sums.run_length[1],
            "num_rounds": total.rounds,
        }
        found |= {
            f"per_position_acc_{index}": scalars.pop(f"accuracy_{index}") for index in range(len(total.sums.count))
        }
        return {PREFIX + name: value for name, value in (found | scalars).items()}

    def _of(self, places: Sequence[int]) -> list[SlotRef]:
        return [self._items[place] for place in places]


@dataclass(slots=True)
class _Measured:
    """Sums of a micro-batch: ``rounds`` started in it, tokens ``committed`` by them, and those of its forward.

    ``unusable``: the number of a sample, from 1 on, for which nothing was measured; ``error`` says why, on the rank
    that found it.
    """

    unusable: float = _SOUND
    rounds: float = 0.0
    committed: float = 0.0
    sums: StepSums = field(default_factory=StepSums)
    error: DataError | None = None

    def values(self) -> list[float]:
        return [self.unusable, self.rounds, self.committed, *self.sums.values()]

    def with_values(self, values: Sequence[float]) -> _Measured:
        unusable, rounds, committed, *sums = values
        return _Measured(unusable, rounds, committed, self.sums.with_values(sums))

    def merge(self, other: _Measured) -> None:
        self.rounds += other.rounds
        self.committed += other.committed
        self.sums.merge(other.sums)


def rounds_of(runs: Runs, items: Sequence[SlotRef]) -> tuple[float, float]:
    """Rounds that decoding the answers of ``items`` starts, and tokens that they commit, by the ``runs`` of a batch.

    A round starts at the first token of an answer (prefill gave it), and the next one at the last token that it
    committed. Tokens at which the draft was not asked are passed over.
    """
    run_at = dict(zip(runs.anchors.tolist(), runs.lengths.tolist(), strict=True))
    rounds = committed = start = 0
    for item in items:
        for first, end in item.ref.loss_spans:
            anchor, last = start + first, start + end - 1
            while anchor < last:
                if anchor not in run_at:
                    anchor += 1
                    continue
                step = 1 + min(run_at[anchor], last - anchor - 1)
                rounds, committed, anchor = rounds + 1, committed + step, anchor + step
        start += item.ref.num_tokens
    return float(rounds), float(committed)


@contextlib.contextmanager
def _evaluating(draft: DraftModel) -> Iterator[None]:
    """Without gradients and in evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in draft.modules()]
    draft.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _stored(features: FeatureSet) -> list[SlotRef]:
    """Samples that have features, in the order of the set, each in a slot of its own."""
    manifest, entries = features.manifest, features.entries.values()
    stored = [entry for entry in entries if isinstance(entry, StoredSample)]
    return [
        SlotRef(
            Slot(0, position),
            SampleRef(
                sample_id=entry.sample_id,
                generation=entry.generation,
                num_tokens=entry.num_tokens,
                loss_spans=entry.loss_spans,
                store="feature_set",
                key=entry.path,
                num_bytes=entry.num_bytes,
                features=entry.features,
                target_revision=manifest.target_revision,
                capture_fingerprint=manifest.fingerprint,
                worker_id="",
            ),
        )
        for position, entry in enumerate(stored)
    ]


def _common_widths(features: FeatureSet, items: Sequence[SlotRef]) -> FeatureWidths:
    """Widths of the features, which must be the same for every sample."""
    if not items:
        raise DataError(
            f"{features.directory}: no evaluation sample could be captured; its index.jsonl says why, for each of them"
        )
    widths = feature_widths(items[0].ref)
    for item in items:
        found = feature_widths(item.ref)
        if found != widths:
            raise DataError(
                f"{features.directory}: evaluation sample {item.ref.sample_id!r} has the features {found}, "
                f"{items[0].ref.sample_id!r} has {widths}; delete the directory, it is captured again"
            )
    return widths
