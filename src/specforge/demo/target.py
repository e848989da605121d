"""Trains the demo's target: a byte-level BPE tokenizer and a small Qwen3 model on the standard library.

``python -m specforge.demo.target OUT_DIR`` (``make tiny-target``) writes an ordinary Hugging Face directory plus
``trained_on.json`` (what it was trained on) and ``training_log.jsonl``. The work is data parallel over ``--ranks``
processes of one compute thread each. A state file in OUT_DIR makes an interrupted run continue.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from specforge.demo.corpus import Module, standard_library_modules
from specforge.monitor.console import progress

STATE_FILE = "state.pt"
LOG_EVERY = 100
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|mask|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TargetRecipe:
    """Sizes and schedule of the demo's target."""

    vocab_size: int = 1024
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 8
    num_heads: int = 6
    num_kv_heads: int = 3
    head_dim: int = 32
    seq_len: int = 256
    global_batch_size: int = 32
    num_steps: int = 1800
    num_warmup_steps: int = 100
    lr: float = 3e-3
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=SPECIAL_TOKENS[-1],
        chat_template=CHAT_TEMPLATE,
    )


def build_model(recipe: TargetRecipe, eos_token_id: int) -> Qwen3ForCausalLM:
    torch.manual_seed(recipe.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            head_dim=recipe.head_dim,
            tie_word_embeddings=True,
            max_position_embeddings=2048,
            eos_token_id=eos_token_id,
            bos_token_id=None,
        )
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, modules: list[Module]) -> torch.Tensor:
    """All modules as one row of token ids, each module closed by the end-of-text token. Shape [tokens], int64."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch([module.text for module in modules]):
        ids.extend(encoding.ids)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def windows(tokens: torch.Tensor, length: int, count: int, key: tuple[int, ...]) -> torch.Tensor:
    """``count`` random windows of ``length`` tokens, a pure function of ``key``. Shape [count, length]."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % (2**63)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - length, (count,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def next_token_loss(model: Qwen3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, recipe: TargetRecipe) -> float:
    """Linear warm-up, then linear decay to zero."""
    warm = min(1.0, (step + 1) / recipe.num_warmup_steps)
    return recipe.lr * min(warm, (recipe.num_steps - step) / (recipe.num_steps - recipe.num_warmup_steps))


def _average_gradients(parameters: list[torch.nn.Parameter], world: int) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    if world > 1:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= world
        offset = 0
        for g in grads:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, tokens: torch.Tensor, seq_len: int, count: int = 64) -> float:
    """Mean next-token loss in nats over fixed windows of the held-out modules."""
    model.eval()
    losses = [next_token_loss(model, rows) for rows in windows(tokens, seq_len, count, (7,)).split(16)]
    model.train()
    return float(torch.stack(losses).mean())


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, modules: list[Module], out: Path) -> None:
    """Write the Hugging Face directory (bf16) with the list of modules it was trained on."""
    rounded: Any = copy.deepcopy(model)
    rounded.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    listed = [{"name": module.name, "sha256": module.content_hash} for module in modules]
    (out / "trained_on.json").write_text(json.dumps({"trained_on": listed}, indent=1) + "\n")


def run_rank(rank: int, world: int, port: int, recipe: TargetRecipe, out: Path) -> None:
    """One data-parallel process of the training."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    modules = standard_library_modules()
    train_modules = [module for module in modules if not module.held_out]
    tokenizer = train_tokenizer([module.text for module in train_modules], recipe.vocab_size)
    train = tokenize(tokenizer, train_modules)
    held_out = tokenize(tokenizer, [module for module in modules if module.held_out])
    model = build_model(recipe, tokenizer.eos_token_id)
    optimizers = make_optimizers(model)
    first = load_state(out, model, optimizers)
    share = recipe.global_batch_size // world
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress("target", recipe.num_steps, "steps", done=first)) if rank == 0 else None
        for step in range(first, recipe.num_steps):
            loss = next_token_loss(model, windows(train, recipe.seq_len, share, (recipe.seed, step, rank)))
            loss.backward()
            _average_gradients(list(model.parameters()), world)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, recipe)
                optimizer.step()
                optimizer.zero_grad()
            if bar is None:
                continue
            bar.update_to(step + 1, f"loss {loss.item():.3f}")
            if (step + 1) % LOG_EVERY == 0:
                row = {
                    "step": step + 1,
                    "train_loss": round(loss.item(), 4),
                    "held_out_loss": round(held_out_loss(model, held_out, recipe.seq_len), 4),
                    "seconds": round(time.monotonic() - started, 1),
                }
                with (out / "training_log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                save_state(out, step + 1, model, optimizers)
    if rank == 0:
        save(model, tokenizer, train_modules, out)
        (out / STATE_FILE).unlink(missing_ok=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def save_state(out: Path, step: int, model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer]) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    partial = out / f"{STATE_FILE}.partial"
    torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, partial)
    partial.replace(out / STATE_FILE)


def load_state(out: Path, model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """The number of steps that an interrupted run in ``out`` had done; 0 without one."""
    if not (out / STATE_FILE).exists():
        return 0
    state: dict[str, Any] = torch.load(out / STATE_FILE, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def train_target(out: Path, recipe: TargetRecipe, ranks: int) -> None:
    """Train the target into ``out`` with ``ranks`` processes."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if ranks == 1:
        run_rank(0, 1, port, recipe, out)
    else:
        spawn(run_rank, args=(ranks, port, recipe, out), nprocs=ranks)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Train the demo's target.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--steps", type=int, default=1800)
    arguments = parser.parse_args(argv)
    train_target(arguments.out, TargetRecipe(num_steps=arguments.steps), arguments.ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
