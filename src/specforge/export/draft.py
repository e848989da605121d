"""Writes a draft in an export format, reads one back, and compares the two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from specforge import __version__
from specforge.algorithms.base import Algorithm, DraftModel, DraftRequest, Sampling, TargetTables
from specforge.algorithms.catalog import algorithm_type, get_algorithm, options_of
from specforge.algorithms.draft_config import DraftConfig
from specforge.contracts.capture import TargetInfo
from specforge.errors import ConfigError, DraftError
from specforge.export.artifact import CONFIG, PROVENANCE_KEY, read_artifact, write_artifact
from specforge.export.base import DTYPES, DraftOrigin, ExportFormat, check_tensors, tensor_dtype
from specforge.export.huggingface import HUGGINGFACE
from specforge.export.model_card import model_card
from specforge.export.provenance import TrainingRecord
from specforge.export.sglang import SGLANG
from specforge.export.vllm import VLLM

FORMATS: dict[str, ExportFormat] = {to.name: to for to in (SGLANG, VLLM, HUGGINGFACE)}

_NUM_CHECK_ROWS = 12
_NUM_CHECK_PROPOSALS = 4


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written. ``num_bytes`` is the size of the weights file."""

    path: Path
    num_tensors: int
    num_bytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class TrainedDraft:
    """A draft with what belongs to it: the record that is exported, and that an export is read into.

    ``options`` are the plain data of the algorithm's options; ``state`` is the draft's ``served_state()``.
    ``target_revision`` ``None``: not recorded.
    """

    options: dict[str, Any]
    config: DraftConfig
    state: Mapping[str, Tensor]
    capture_dtype: str
    target_revision: str | None

    def algorithm(self) -> Algorithm:
        algorithm: Algorithm = get_algorithm(options_of(self.options))
        return algorithm

    def build(self, tables: TargetTables) -> DraftModel:
        """The draft of ``config`` with the weights of ``state``; a tensor too few or too many is a DraftError."""
        kept = None
        if self.config.draft_vocab_size != self.config.vocab_size:
            if "t2d" not in self.state:
                raise DraftError("the draft has a pruned vocabulary but lacks the tensor 't2d'; export it again")
            kept = torch.nonzero(self.state["t2d"]).flatten()
        draft = self.algorithm().build_draft(self.config, tables, seed=0, kept_ids=kept)
        own = draft.state_dict()
        if differing := sorted(set(own) ^ set(self.state)):
            kind = "lacks" if differing[0] in own else "has an unknown"
            raise DraftError(f"the draft {kind} tensor {differing[0]!r}; write it again with this version")
        try:
            draft.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in self.state.items()})
        except RuntimeError as error:
            raise DraftError(
                f"the draft's tensors do not fit its config ({str(error).splitlines()[-1].strip()})"
            ) from None
        return draft.eval()


@dataclass(frozen=True, slots=True)
class ReloadCheck:
    """Log-probabilities of the reloaded draft against the original on random inputs, largest absolute differences.

    ``difference_to_rounded`` (the original rounded to the export's number format) is 0 for a sound export;
    ``difference_to_original`` is what the rounding itself costs.
    """

    difference_to_rounded: float
    difference_to_original: float

    @property
    def identical(self) -> bool:
        return self.difference_to_rounded == 0.0


def write_export(
    trained: TrainedDraft,
    target: TargetInfo,
    to: ExportFormat,
    out: Path,
    dtype: str | None = None,
    training: TrainingRecord | None = None,
    *,
    verify: Callable[[Path], None] | None = None,
) -> ExportReport:
    """Write ``trained`` to the directory ``out``, whole or not at all; an older export is replaced.

    ``training`` goes into the model card. ``verify`` gets the directory before it is put in its place, and raises a
    :class:`DraftError` where it is not as it should be. Raises :class:`DraftError` for what the format's reader would
    not serve, and for an ``out`` with anything else.
    """
    name, chosen = trained.options["name"], dtype or to.dtype
    if chosen not in DTYPES:
        raise DraftError(f"cannot export weights as {chosen!r}; choose one of {', '.join(DTYPES)}")
    layout, config = to.layout(name), trained.config
    origin = DraftOrigin(trained.options, Path(target.path).name, target.architecture)
    served = layout.config(config, origin)
    check_tensors(trained.state, layout.shapes(config), None)
    tensors = {
        key: tensor.to(tensor_dtype(key, tensor, DTYPES[chosen]), copy=True)
        for key, tensor in layout.encode(trained.state, config).items()
    }
    provenance = {
        "version": __version__,
        "format": to.name,
        "algorithm": name,
        "options": trained.options,
        "draft_config": config.to_dict(),
        "capture_dtype": trained.capture_dtype,
        "target_name": origin.target_name,
        "target_architecture": origin.target_architecture,
        "target_revision": trained.target_revision,
        "training": None if training is None else training.to_dict(),
    }
    served |= {"dtype": chosen, "torch_dtype": chosen, PROVENANCE_KEY: provenance}
    card = model_card(name, config, target, layout.how_to_serve(config, origin), chosen, training)
    num_bytes = write_artifact(out, served, tensors, card, verify)
    return ExportReport(out, len(tensors), num_bytes, chosen)


def read_export(directory: Path) -> TrainedDraft:
    """An exported draft with its tensors as they are on disk.

    Strict on the configuration (every key of the reader must say what the draft config says), on unknown and missing
    tensors, shapes, number formats and vocabulary maps: a :class:`DraftError` otherwise.
    """
    artifact = read_artifact(directory)
    source, served = directory / CONFIG, artifact.config
    provenance = served.get(PROVENANCE_KEY)
    if not isinstance(provenance, dict):
        raise DraftError(f"{source} lacks {PROVENANCE_KEY!r}; give a directory that specforge export wrote")
    needed = (
        "format", "options", "draft_config", "capture_dtype", "target_name", "target_architecture", "target_revision",
    )  # fmt: skip
    if missing := [key for key in needed if key not in provenance]:
        raise DraftError(f"{source} lacks {PROVENANCE_KEY}.{missing[0]}; export the draft again")
    to = FORMATS.get(str(provenance["format"]))
    if to is None:
        raise DraftError(f"{source} is of the format {provenance['format']!r}; expected one of {', '.join(FORMATS)}")
    try:
        options = options_of(provenance["options"])
    except (ValidationError, ConfigError, KeyError) as error:
        raise DraftError(f"{source}: its algorithm cannot be read ({str(error).splitlines()[0]})") from None
    config = algorithm_type(options.name).config_type.from_dict(provenance["draft_config"])
    layout = to.layout(options.name)
    origin = DraftOrigin(provenance["options"], provenance["target_name"], provenance["target_architecture"])
    _check_config(source, served, layout.config(config, origin))
    _check_understood(source, to, to.understood(options.name, served), config)
    dtype = DTYPES.get(str(served.get("dtype")))
    if dtype is None:
        raise DraftError(f"{source}: expected dtype to be one of {', '.join(DTYPES)}; export again")
    check_tensors(artifact.tensors, layout.written_shapes(config), dtype)
    state = layout.decode(artifact.tensors, config)
    return TrainedDraft(
        provenance["options"], config, state, provenance["capture_dtype"], provenance["target_revision"]
    )


def _check_config(source: Path, served: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if key not in served:
            raise DraftError(f"{source} lacks the key {key!r}; export the draft again")
        if served[key] != value:
            raise DraftError(
                f"{source} says {key} = {served[key]!r}, expected {value!r} by the draft config that it records; "
                "export the draft again"
            )


def _check_understood(source: Path, to: ExportFormat, facts: Mapping[str, Any], config: DraftConfig) -> None:
    """What the reader understands must be the draft, whoever wrote the keys."""
    for name, value in config.to_dict().items():
        if name in facts and facts[name] != value:
            raise DraftError(
                f"{source}: {to.title} would take the draft's {name} for {facts[name]!r}, but it is {value!r}; "
                "export the draft again, and if that gives the same, report it"
            )


def verify_export(directory: Path, draft: DraftModel, tables: TargetTables) -> ReloadCheck:
    """Reload the export and compare tensors, and what is proposed on random inputs, with ``draft``.

    Raises :class:`DraftError` unless the reloaded draft equals the rounded original bit for bit.
    """
    exported = read_export(directory)
    reloaded = exported.build(tables).to(next(iter(draft.parameters())).device)
    rounded = _rounded(draft, exported)
    theirs = rounded.served_state()
    differing = [name for name, tensor in reloaded.served_state().items() if not torch.equal(tensor, theirs[name])]
    algorithm = exported.algorithm()
    found = _probe(algorithm, reloaded, exported.config, tables)
    check = ReloadCheck(
        difference_to_rounded=_difference(found, _probe(algorithm, rounded, exported.config, tables)),
        difference_to_original=_difference(found, _probe(algorithm, draft, exported.config, tables)),
    )
    if differing or not check.identical:
        raise DraftError(
            f"{directory} does not give the logits of the draft it was exported from (largest difference "
            f"{check.difference_to_rounded:g}{f', tensor {differing[0]!r}' if differing else ''}); "
            "export the draft again"
        )
    return check


def _rounded(draft: DraftModel, exported: TrainedDraft) -> DraftModel:
    """A copy of ``draft`` with the weights that ``exported`` could hold of it."""
    rounded = copy.deepcopy(draft)
    with torch.no_grad():
        for name, tensor in rounded.state_dict().items():
            tensor.copy_(tensor.to(exported.state[name].dtype))
    return rounded


Probe = tuple[tuple[int, ...], Tensor]


@torch.no_grad()
def _probe(algorithm: Algorithm, draft: DraftModel, config: DraftConfig, tables: TargetTables) -> Probe:
    """What is proposed after random features and tokens: the tokens, and the log-probabilities [l, V] of each."""
    generator = torch.Generator().manual_seed(0)
    spec = algorithm.capture_spec(config, "float32")
    features = {
        name: torch.randn(_NUM_CHECK_ROWS, width, generator=generator).to(tables.embed_tokens)
        for name, _, width in spec.widths(config.target_hidden_size)
    }
    tokens = torch.randint(0, config.vocab_size, (_NUM_CHECK_ROWS + 1,), generator=generator).tolist()
    proposer = algorithm.proposer(draft.eval(), tables)
    proposer.reset()
    request = DraftRequest(_NUM_CHECK_PROPOSALS, Sampling(1.0, torch.Generator().manual_seed(0)))
    proposal = proposer.propose(tokens, features, request)
    if proposal.probabilities is None:
        return proposal.tokens, torch.zeros(0)
    return proposal.tokens, proposal.probabilities.log()


def _difference(a: Probe, b: Probe) -> float:
    """Largest difference of log-probabilities, up to the first proposal that follows differing ones."""
    (tokens, left), (others, right) = a, b
    same = 0
    while same < min(len(tokens), len(others)) and tokens[same] == others[same]:
        same += 1
    if not left.numel() or not right.numel():
        return 0.0 if tokens == others else float("inf")
    rows = min(same + 1, len(left), len(right))
    mine, theirs = left[:rows], right[:rows]
    # both leave the same ids out: -inf on the two sides is no difference
    gap = torch.where(mine == theirs, torch.zeros_like(mine), (mine - theirs).abs())
    return float(gap.max())
