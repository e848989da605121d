"""Options of the training loop (``training`` section of a run). Imports no tensor library."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainingConfig(BaseModel):
    """Length, batch, optimizer, schedule and checkpoints of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_epochs: PositiveInt = Field(1, description="Passes over the samples.")
    max_steps: PositiveInt | None = Field(
        None, description="End after this many optimizer steps, even within an epoch; null: at the end of the epochs."
    )
    global_batch_size: PositiveInt = Field(16, description="Samples of one optimizer step, over all ranks.")
    micro_batch_tokens: PositiveInt = Field(
        2048, description="Tokens packed into one forward and backward; does not change the result."
    )
    lr: float | None = Field(
        None,
        gt=0.0,
        description="Peak learning rate; null: the algorithm's, 6e-4 for block drafts, 1e-4 for the others.",
    )
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        "cosine",
        description="How the learning rate falls after the warm-up; wsd: it stays at the peak until the last "
        "decay_ratio of the steps.",
    )
    decay_ratio: float = Field(0.1, gt=0.0, le=1.0, description="Share of all steps in which wsd falls.")
    decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = Field(
        "cosine", description="How wsd falls at the end."
    )
    warmup_ratio: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Share of all steps with a rising learning rate; null: the algorithm's, 0.04 for block drafts, "
        "0.015 for the others.",
    )
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0, description="Learning rate at the end, as a share of the peak.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: the draft's matrices by Muon, tables and norms by AdamW; adamw: everything by AdamW.",
    )
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay.")
    decay: Literal["matrices", "all"] = Field(
        "matrices", description="What weight_decay is for: the matrices alone, or norms and biases too."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Decay of AdamW's first and second moment.")
    max_grad_norm: float | None = Field(
        None,
        gt=0.0,
        description="Gradients are scaled down to this global 2-norm; null: the algorithm's, 1.0 for block drafts, 0.5 "
        "for the others.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Number format of the draft's computations (weights and optimizer stay float32); "
        "auto: float32 on a CPU, bfloat16 on CUDA.",
    )
    device: Device = Field(
        "auto", description="Where the draft is trained: auto (CUDA when there is one), cpu, cuda or cuda:N."
    )
    sharding: Literal["shard", "replicate", "hybrid"] = Field(
        "shard",
        description="How several train ranks hold weights, gradients and optimizer state (FSDP2): one copy over all of "
        "them, a copy on each, or a copy over every shard_size ranks.",
    )
    shard_size: PositiveInt | None = Field(None, description="Ranks that hold one copy together, with sharding=hybrid.")
    sequence_parallel: PositiveInt = Field(
        1,
        description="Ranks that share the rows of every sample (Ulysses), for samples too long for one device; divides "
        "the number of train ranks. For eagle3 and dflash.",
    )
    activation_checkpointing: bool = Field(
        False, description="Compute the activations of each block of the draft again in the backward, to save memory."
    )
    compile: bool = Field(False, description="Compile the blocks of the draft with torch.compile.")
    checkpoint_every: PositiveInt = Field(100, description="Optimizer steps between two checkpoints.")
    keep_last: PositiveInt = Field(
        2, description="Newest checkpoints kept on disk; older ones are deleted, but for the best one."
    )
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints at multiples of this many steps are kept for good; null: none."
    )
    log_every: PositiveInt = Field(1, description="Optimizer steps between two lines of the metrics log.")
    threads: PositiveInt = Field(
        1, description="Compute threads of each process on a CPU; the same weights need the same number."
    )

    @model_validator(mode="after")
    def _shards_have_a_size(self) -> Self:
        if (self.sharding == "hybrid") != (self.shard_size is not None):
            raise ValueError(
                f"sharding {self.sharding} with shard_size {self.shard_size}: set shard_size with hybrid, and only then"
            )
        return self
