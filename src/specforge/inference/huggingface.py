"""HFTargetEngine: a transformers model in process. The oracle that every other engine is compared with.

Legend: S tokens of a sequence, m tokens of one forward, H hidden size, V vocabulary, D width of a feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from specforge.algorithms.base import Sampling, TargetTables, target_logits
from specforge.algorithms.parts.sampling import GREEDY_TEMPERATURE, distribution, draw
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.encoding import encoded
from specforge.data_plane.tensors import Source
from specforge.errors import DataError, TargetError
from specforge.inference.batch import HFBatchSession
from specforge.inference.cache import BatchCache, GrowingCache
from specforge.inference.engine import CapturedSample, Generation
from specforge.inference.layers import EverythingInFloat64, decoder_layers, tapped
from specforge.inference.rope import forget_longest, in_groups, length_of_short_rope
from specforge.inference.target import read_target_info
from specforge.inference.tree import BatchAttention, TreeAttention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFTargetEngine:
    """Implements ``TargetEngine`` with a local safetensors model: frozen, eval mode, no gradients.

    ``dtype`` is that of the weights and the computation (``"float32"``, ``"bfloat16"``, ``"float16"``). ``target`` is
    a directory or the ``TargetInfo`` read from it. Raises :class:`TargetError` for a directory that cannot be used.
    """

    def __init__(
        self,
        target: TargetInfo | str | Path,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.info = target if isinstance(target, TargetInfo) else read_target_info(target, trust_remote_code)
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device)
        self._model = _load(self.info, self.dtype, trust_remote_code).to(self.device)
        self._backbone = self._model.get_decoder()
        self._layers = decoder_layers(self._backbone, self.info.num_layers)
        self._tables = _tables(self._model, self.info)
        self._short_rope = length_of_short_rope(self._model.config.get_text_config(decoder=True).to_dict())
        self._float64: Any = None

    @property
    def tables(self) -> TargetTables:
        """The target's embedding and output head, shared with the model (no copy)."""
        return self._tables

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
        """One unpadded forward a task: ``input_ids`` int32 [S], ``aux`` [S, n*H], ``last`` [S, H] for ``spec.dtype``.

        Raises :class:`TargetError` for layer ids that the target does not have, :class:`DataError` for a prompt
        that it cannot read (empty, or ids outside the vocabulary).
        """
        for task in tasks:
            yield from self.capture_together([task], spec)

    def capture_together(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> list[CapturedSample]:
        """Forwards of several ``tasks`` each, padded behind their ends, which a causal target does not see: what each
        gets differs from what it gets alone by rounding only. Where a long sequence turns the target's RoPE, each long
        one has a forward of its own. Otherwise as :meth:`capture`.
        """
        self._check_layers(spec)
        return in_groups(
            tasks, lambda task: task.num_tokens, self._short_rope, lambda group: self._forward_together(group, spec)
        )

    def _forward_together(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> list[CapturedSample]:
        longest = max(task.num_tokens for task in tasks)
        # any valid id serves as padding
        rows = [(*task.input_ids, *task.input_ids[:1] * (longest - task.num_tokens)) for task in tasks]
        input_ids = self._ids(rows)
        self._forget_longest()
        with torch.no_grad(), tapped(self._layers, spec.aux_layers) as outputs:
            last = self._backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        found = _features(outputs, last, spec)
        samples = []
        for row, task in enumerate(tasks):
            tensors: dict[str, Source] = {"input_ids": input_ids[row, : task.num_tokens].to(torch.int32)}
            for name, layers in found.items():
                tensors |= encoded(name, [layer[row, : task.num_tokens] for layer in layers], spec.dtype)
            samples.append(CapturedSample(task.sample_id, tensors))
        return samples

    def generate(
        self, prompts: Sequence[Sequence[int]], options: Generate, between: Callable[[], None] = lambda: None
    ) -> list[Generation]:
        """Greedy continuations, in batches as :meth:`capture_together`, or drawn ones, one prompt at a time with a
        generator of its own.

        A row ends at the first of the target's stop tokens (included) or after ``max_new_tokens``. Ties go to the
        lowest id. ``between`` is called before every forward, and ends the generation with what it raises. Raises
        :class:`DataError` for a prompt that the target cannot read.
        """
        limit = options.max_new_tokens
        if options.temperature < GREEDY_TEMPERATURE:
            return in_groups(
                prompts,
                lambda prompt: len(prompt) + limit,
                self._short_rope,
                lambda group: self._decode(group, limit, lambda logits: logits.argmax(dim=-1), between),
            )
        drawn = (self._decode([prompt], limit, _drawn_with(options), between) for prompt in prompts)
        return [generation for alone in drawn for generation in alone]

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        choose: Callable[[Tensor], Tensor],
        between: Callable[[], None],
    ) -> list[Generation]:
        """One batch, in which prompts of unequal length are padded on the left; ``choose`` gives tokens [batch] for
        logits fp32 [batch, V].
        """
        if not prompts or max_new_tokens < 1:
            return [Generation((), False) for _ in prompts]
        input_ids, mask, positions = self._left_padded(prompts)
        stops = torch.tensor(self.info.eos_token_ids, dtype=torch.long, device=self.device)
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        self._forget_longest()
        cache = GrowingCache()
        tables = self.tables
        columns: list[Tensor] = []
        with torch.no_grad():
            while True:
                between()
                hidden = self._backbone(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
                tokens = choose(target_logits(tables, hidden))
                columns.append(tokens)
                finished |= torch.isin(tokens, stops)
                if len(columns) == max_new_tokens or (len(stops) and bool(finished.all())):
                    break
                input_ids, positions = tokens[:, None], positions[:, -1:] + 1
                mask = None if mask is None else torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        rows = torch.stack(columns, dim=1).tolist()
        return [_until_stop(row, self.info.eos_token_ids) for row in rows]

    def close(self) -> None:
        """Nothing is held but memory."""

    def session(self, spec: CaptureSpec) -> HFTargetSession:
        """A new KV-cache decoding session of one sequence, with the features of ``spec`` captured per forward."""
        self._check_layers(spec)
        return HFTargetSession(self, spec)

    def batch_session(self, spec: CaptureSpec, num_sequences: int) -> HFBatchSession:
        """A new KV-cache decoding session of up to ``num_sequences`` sequences."""
        self._check_layers(spec)
        return HFBatchSession(self, spec, num_sequences)

    def reference_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [V] float64 of the token after ``token_ids``, from a float64 copy of the model.

        The copy is made at the first call and kept (twice the bytes of a float32 model).
        """
        if self._float64 is None:
            self._float64 = copy.deepcopy(self._model).double()
        tables = _tables(self._float64, self.info)
        with torch.no_grad(), EverythingInFloat64():
            last = self._float64.get_decoder()(input_ids=self._ids([token_ids]), use_cache=False).last_hidden_state
            return target_logits(tables, last[0, -1])

    def forward_step(
        self, token_ids: Sequence[int], cache: GrowingCache, spec: CaptureSpec, parents: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward of a session: fp32 logits [m, V] and features [m, D]; ``cache`` grows by m positions."""
        input_ids = self._ids([token_ids])
        start = cache.get_seq_length()
        positions, mask = torch.arange(start, start + input_ids.shape[1]), None
        if parents is not None:
            tree = TreeAttention.of(parents, start)
            positions, mask = tree.positions, tree.mask(self._backbone.config, self.dtype, self.device)
        with torch.no_grad(), tapped(self._layers, spec.aux_layers) as outputs:
            last = self._backbone(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions[None].to(self.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            found = _features(outputs, last, spec)
            features = {name: torch.cat(it, dim=-1)[0] if len(it) > 1 else it[0][0] for name, it in found.items()}
            return target_logits(self.tables, last[0]), features

    def forward_batch(
        self, rows: Sequence[Sequence[int]], cache: BatchCache, attention: BatchAttention, spec: CaptureSpec
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """One forward of n sequences, each padded to m tokens: the last hidden states [n, m, H], and by the name of a
        feature the layers [n, m, H] that it consists of.
        """
        longest = max(map(len, rows))
        # padding repeats a token of its sequence: nothing sees it, so any valid id serves
        input_ids = self._ids([[*row, *row[:1] * (longest - len(row))] for row in map(list, rows)])
        with torch.no_grad(), tapped(self._layers, spec.aux_layers) as outputs:
            last = self._backbone(
                input_ids=input_ids,
                attention_mask=attention.mask(self._backbone.config, self.dtype, self.device),
                position_ids=attention.positions.to(self.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return last, _features(outputs, last, spec)

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        for row in rows:
            if not row:
                raise DataError("a prompt has no tokens; expected at least one")
            if min(row) < 0 or max(row) >= self.info.vocab_size:
                raise DataError(
                    f"a prompt has token id {max(row) if min(row) >= 0 else min(row)}, but the target's vocabulary "
                    f"has {self.info.vocab_size} tokens; render the prompt with the target's own tokenizer"
                )
        return torch.tensor([list(row) for row in rows], dtype=torch.long, device=self.device)

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None, Tensor]:
        """ids, mask (``None`` where nothing is padded) and 0-based positions, each [batch, longest]."""
        longest = max(len(prompt) for prompt in prompts)
        if all(len(prompt) == longest for prompt in prompts):
            positions = torch.arange(longest, device=self.device).expand(len(prompts), -1)
            return self._ids(prompts), None, positions
        # a pad position repeats the first token: its row is masked everywhere, so any valid id serves
        padded = self._ids([[*prompt[:1]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        index = torch.arange(longest, device=self.device)[None] - (longest - lengths)[:, None]
        return padded, (index >= 0).long(), index.clamp(min=0)

    def _forget_longest(self) -> None:
        if self._short_rope is not None:
            forget_longest(self._backbone)

    def _check_layers(self, spec: CaptureSpec) -> None:
        wrong = [layer for layer in spec.aux_layers if not 0 <= layer < self.info.num_layers]
        if wrong:
            raise TargetError(
                f"layer {wrong[0]} was asked for, but the target {self.info.path} has {self.info.num_layers} layers; "
                f"choose layer ids from 0 to {self.info.num_layers - 1}"
            )


class HFTargetSession:
    """Implements ``TargetSession``. All layers keep every position; the masks still apply sliding windows."""

    def __init__(self, engine: HFTargetEngine, spec: CaptureSpec) -> None:
        self._engine = engine
        self._spec = spec
        self._cache = GrowingCache()
        self._last_start = 0

    def forward(
        self, token_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._last_start = self._cache.get_seq_length()
        return self._engine.forward_step(token_ids, self._cache, self._spec, parents)

    def crop(self, num_tokens: int) -> None:
        surplus = self._cache.get_seq_length() - num_tokens
        if surplus < 0:
            raise ValueError(f"cannot keep {num_tokens} positions of a cache of {num_tokens + surplus}")
        if surplus:
            self._cache.crop(-surplus)

    def keep(self, rows: Sequence[int]) -> None:
        self._cache.keep(self._last_start, torch.tensor(rows, dtype=torch.long))


def _load(info: TargetInfo, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(info.path, local_files_only=True, trust_remote_code=trust_remote_code)
        # sdpa has no soft cap on attention scores
        softcap = config.get_text_config(decoder=True).to_dict().get("attn_logit_softcapping")
        with _no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                info.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                attn_implementation="sdpa" if softcap is None else "eager",
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TargetError(
            f"{info.path} could not be loaded as a causal language model ({reason}); "
            "check that its weights are complete and that the installed transformers knows it"
        ) from error
    return model.eval().requires_grad_(False)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A run draws its own progress; transformers would draw one for every load."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _tables(model: Any, info: TargetInfo) -> TargetTables:
    head = model.get_output_embeddings()
    return TargetTables(
        embed_tokens=model.get_input_embeddings().weight,
        lm_head=head.weight,
        logit_softcap=info.logit_softcap,
        logit_scale=info.logit_scale,
        lm_head_bias=head.bias,
    )


def _features(outputs: dict[int, Tensor], last: Tensor, spec: CaptureSpec) -> dict[str, list[Tensor]]:
    """Name -> the captured layers [batch, m, H] that it consists of, as they were computed."""
    features = {"aux": [outputs[layer] for layer in spec.aux_layers], "last": [last] if spec.last_hidden else []}
    return {name: layers for name, layers in features.items() if layers}


def _drawn_with(options: Generate) -> Callable[[Tensor], Tensor]:
    """Draws a token for logits [1, V] at every call, with a generator that ``options.seed`` alone determines."""
    generator = torch.Generator().manual_seed(options.seed)
    top_p = options.top_p if options.top_p < 1.0 else None
    sampling = Sampling(options.temperature, generator, options.top_k or None, top_p)

    def choose(logits: Tensor) -> Tensor:
        return torch.tensor([draw(distribution(logits[0], sampling), generator)], device=logits.device)

    return choose


def _until_stop(row: list[int], stops: tuple[int, ...]) -> Generation:
    for index, token in enumerate(row):
        if token in stops:
            return Generation(tuple(row[: index + 1]), True)
    return Generation(tuple(row), False)
