"""Small drafts, tables and packed batches for the tests of algorithms."""

from dataclasses import dataclass, replace

import pytest
import torch

from specforge.algorithms.base import StepContext, StepOutput, TargetTables
from specforge.algorithms.eagle3.algorithm import Eagle3
from specforge.algorithms.eagle3.config import Eagle3DraftConfig, Eagle3Options
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import Slot

HIDDEN, VOCAB = 16, 40

CONFIG = Eagle3DraftConfig(
    hidden_size=HIDDEN,
    target_hidden_size=HIDDEN,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=128,
    vocab_size=VOCAB,
    draft_vocab_size=VOCAB,
    aux_layers=(1, 3, 4),
    target_num_layers=8,
)


def pack(documents: list[dict[str, torch.Tensor]]) -> TrainBatch[torch.Tensor]:
    """One batch of samples ``{ids, mask, aux, last}``."""
    lengths = tuple(len(document["ids"]) for document in documents)

    def cat(name: str) -> torch.Tensor:
        return torch.cat([document[name] for document in documents])

    return TrainBatch(
        input_ids=cat("ids"),
        loss_mask=cat("mask"),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        document_ids=torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]),
        features={"aux": cat("aux"), "last": cat("last")},
        lengths=lengths,
        sample_ids=tuple(str(i) for i in range(len(lengths))),
        slots=tuple(Slot(0, i) for i in range(len(lengths))),
    )


def empty_batch() -> TrainBatch[torch.Tensor]:
    ids = torch.zeros(0, dtype=torch.int64)
    features = {"aux": torch.zeros(0, 3 * HIDDEN), "last": torch.zeros(0, HIDDEN)}
    return TrainBatch(ids, ids.bool(), ids, ids, features, (), (), ())


@dataclass
class Lab:
    """Builders with one random generator."""

    generator: torch.Generator

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def tables(self) -> TargetTables:
        return TargetTables(self.random(VOCAB, HIDDEN), self.random(VOCAB, HIDDEN))

    def document(self, length: int, answer_from: int = 2) -> dict[str, torch.Tensor]:
        mask = torch.zeros(length, dtype=torch.bool)
        mask[answer_from:] = True
        return {
            "ids": torch.randint(0, VOCAB, (length,), generator=self.generator),
            "mask": mask,
            "aux": self.random(length, 3 * HIDDEN),
            "last": self.random(length, HIDDEN),
        }

    def draft(self, algorithm: Eagle3, tables: TargetTables, **changes: object) -> Eagle3Draft:
        """A draft whose weights are large enough for attention to matter."""
        config = replace(CONFIG, **changes)
        kept = None
        if config.draft_vocab_size < VOCAB:
            kept = torch.randperm(VOCAB, generator=self.generator)[: config.draft_vocab_size].sort().values
        draft = algorithm.build_draft(config, tables, seed=0, kept_ids=kept)
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                parameter.copy_(self.random(*parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
        return draft


@pytest.fixture
def lab() -> Lab:
    return Lab(torch.Generator().manual_seed(7))


def eagle3(**options: object) -> Eagle3:
    return Eagle3(Eagle3Options(**options))


CONTEXT = StepContext(global_step=0, total_steps=1, seed=0)


def run_loss(
    algorithm: Eagle3, draft: Eagle3Draft, tables: TargetTables, batch: TrainBatch[torch.Tensor]
) -> StepOutput:
    return algorithm.forward_loss(draft, tables, batch, CONTEXT)


def gradients(draft: Eagle3Draft) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}


@pytest.fixture(name="context")
def context_fixture() -> StepContext:
    return CONTEXT


@pytest.fixture(name="pack")
def pack_fixture():
    return pack


@pytest.fixture(name="empty_batch")
def empty_batch_fixture() -> TrainBatch[torch.Tensor]:
    return empty_batch()


@pytest.fixture(name="eagle3")
def eagle3_fixture():
    return eagle3


@pytest.fixture(name="run_loss")
def run_loss_fixture():
    return run_loss


@pytest.fixture(name="gradients")
def gradients_fixture():
    return gradients
