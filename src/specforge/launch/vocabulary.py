"""The pruned draft vocabulary of a run: counted from its training prompts once, then read from a file.

The file is named after everything that it depends on, so a resumed run, a repeated one, and one that shares
``data.vocabulary_cache`` find it; a damaged file is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specforge.algorithms.parts.vocabulary import kept_ids, target_ids, vocabulary_maps
from specforge.errors import ConfigError
from specforge.inference.target import load_tokenizer
from specforge.launch.inputs import RunInputs, tasks_sha256, tokenizer_sha256
from specforge.prompts.vocabulary import count_loss_tokens

_LOG = logging.getLogger(__name__)


def draft_vocabulary(inputs: RunInputs) -> Tensor | None:
    """Target ids that the draft of a run keeps, int64 [W] ascending on the CPU; ``None`` where nothing is pruned."""
    draft = inputs.algorithm.draft_config(inputs.target)
    size, vocab_size = draft.draft_vocab_size, draft.vocab_size
    if size == vocab_size:
        return None
    target, config = Path(inputs.target.path), inputs.config
    if any(task.num_to_generate for task in inputs.tasks):
        raise ConfigError(
            f"algorithm.draft_vocab_size is {size}: which ids the draft keeps is counted in the answers, and with "
            "data.generate they are not there yet; write them first with specforge regenerate and train on that file, "
            "or leave draft_vocab_size out"
        )
    tokenizer = tokenizer_sha256(target)
    num_tokens = len(load_tokenizer(target, config.target.trust_remote_code)) if tokenizer else None
    if num_tokens is not None and size > num_tokens:
        raise ConfigError(
            f"algorithm.draft_vocab_size is {size}, but the tokenizer of {target} knows {num_tokens} ids (its table "
            f"has {vocab_size} rows); choose at most {num_tokens}, or leave it out"
        )

    def count() -> Tensor:
        return kept_ids(torch.tensor(count_loss_tokens(inputs.tasks, vocab_size, num_tokens)), size)

    facts = {
        "data_sha256": tasks_sha256(inputs.tasks),
        "target_revision": inputs.target.revision,
        "tokenizer_sha256": tokenizer,
        "draft_vocab_size": size,
        "vocab_size": vocab_size,
    }
    if config.data.vocabulary_cache is not None:
        _check_cache(config.data.vocabulary_cache)
    return cached_vocabulary(config.data.vocabulary_cache or config.run_dir / "vocabulary", facts, count)


def cached_vocabulary(directory: Path, facts: dict[str, str | int], count: Callable[[], Tensor]) -> Tensor:
    """The kept ids that ``count`` gives, from the file of ``facts`` in ``directory`` where there is a whole one."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = directory / f"{key[:32]}.safetensors"
    found = _read(path, facts)
    if found is not None:
        return found
    kept = count()
    _write(path, facts, kept)
    return kept


def vocabulary_sha256(kept: Tensor | None) -> str:
    """SHA-256 of the target ids that a draft keeps; empty where nothing is pruned."""
    return "" if kept is None else hashlib.sha256(kept.numpy().tobytes()).hexdigest()


def _check_cache(directory: Path) -> None:
    """Refuse what can be no directory, before minutes are spent on counting."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(
            f"data.vocabulary_cache is {directory}, but {existing} is a file; give a directory, which may be a new "
            "one, or leave it out"
        )


def _write(path: Path, facts: dict[str, str | int], kept: Tensor) -> None:
    d2t, t2d = vocabulary_maps(kept, int(facts["vocab_size"]))
    metadata = {"facts": json.dumps(facts, sort_keys=True), "sha256": _content_sha256(d2t, t2d)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(save({"d2t": d2t, "t2d": t2d}, metadata))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read(path: Path, facts: dict[str, str | int]) -> Tensor | None:
    """The kept ids in ``path``; ``None`` for a file that is not there, damaged, or of something else."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, d2t, t2d = file.metadata() or {}, file.get_tensor("d2t"), file.get_tensor("t2d")
    except (OSError, SafetensorError) as error:
        _LOG.warning("%s is damaged and made again (%s)", path, error)
        return None
    whole = metadata.get("sha256") == _content_sha256(d2t, t2d)
    if not whole or metadata.get("facts") != json.dumps(facts, sort_keys=True):
        _LOG.warning("%s is damaged and made again (its content is not what it says)", path)
        return None
    return target_ids(d2t)


def _content_sha256(d2t: Tensor, t2d: Tensor) -> str:
    return hashlib.sha256(d2t.numpy().tobytes() + t2d.numpy().tobytes()).hexdigest()
