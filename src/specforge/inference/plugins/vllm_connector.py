"""SpecForgeConnector: a vLLM server that captures. The only file that knows vLLM.

Load it with ``--kv-transfer-config`` beside ``--speculative-config`` with the method ``extract_hidden_states``, whose
"draft" proposes nothing: in every step it writes the hidden states of the step's tokens into a cache of its own, in
blocks that the prefix cache shares and keeps like all others (``docs/howto/vllm-capture.md``).

The scheduler's side of this connector reads the orders of requests, says in which step a prompt is complete, and puts
receipts into the answers. The worker's side copies the prompt's blocks at the end of that step and has them put beside
the next one. The request is held open meanwhile by the few tokens that were asked for with it.

vLLM's ids count from the embeddings: its ``k`` is the output of our 0-based layer ``k - 1``, and its last one is taken
before the final norm, which is applied here.

Legend: S tokens, H hidden size, B blocks, P positions of a block, L layers that vLLM extracts.
"""

# ruff: noqa: ARG002, ARG003 - the signatures are vLLM's

from __future__ import annotations

import dataclasses
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec
from vllm.v1.request import RequestStatus

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import PROTOCOL, CaptureRequest, ServerInfo, Sink
from specforge.contracts.capture_wire import Refusal
from specforge.errors import ConfigError, ContractError, TargetError
from specforge.inference.plugins.orders import (
    FIELD,
    NUM_HOLD_TOKENS,
    NUM_SPARE_TOKENS,
    RECEIPT,
    Order,
    Receipt,
    check_capture,
    read_order,
    refusal_of,
)
from specforge.inference.plugins.recorder import Outcome, Recorder, RecorderLimits, read_limits, sinks_of
from specforge.inference.plugins.target_files import FinalNorm, read_final_norm, read_revision

OLDEST = (0, 32)
"""The first version of vLLM that has what is used here."""

UNWRITTEN = Refusal(
    "busy",
    "vLLM did not write the hidden states of all tokens of this prompt; ask again, and if that does not help start "
    "it without prefix caching",
)
"""Nobody is to blame: beside a request that is near the longest sequence vLLM extracts nothing in a step."""

WHOLE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)

logger = logging.getLogger("vllm.specforge")


@dataclass
class CaptureBlocks:
    """A prompt that this step completes. ``block_ids`` of its hidden states, [ceil(S / P)] at least."""

    request_id: str
    request: CaptureRequest
    token_ids: list[int]
    block_ids: list[int]


@dataclass
class StepOrders(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to the worker, for one step. ``fresh_blocks``: blocks whose content is void from here on;
    ``copies``: (from, to) of blocks that vLLM copies before the step.
    """

    fresh_blocks: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    captures: list[CaptureBlocks] = field(default_factory=list)
    closes: list[tuple[str, Sink]] = field(default_factory=list)


@dataclass
class StepOutcomes(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the worker to the scheduler, by request id."""

    outcomes: dict[str, Outcome]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, StepOutcomes)
        return StepOutcomes(self.outcomes | other.outcomes)


@dataclass(frozen=True)
class _Setup:
    """What is known of the engine when it starts. ``ids``: what vLLM extracts, in the order of its cache."""

    directory: Path
    ids: tuple[int, ...]
    num_layers: int
    dtype: torch.dtype
    limits: RecorderLimits
    group: int
    block_size: int

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any) -> _Setup:
        """Raises ``ConfigError`` for an engine that cannot capture."""
        _check_engine(vllm_config)
        draft = vllm_config.speculative_config.draft_model_config.hf_config
        ids = list(getattr(draft, "eagle_aux_hidden_state_layer_ids", None) or ())
        num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        if len(set(ids)) < len(ids) or not ids or not 0 <= min(ids) <= max(ids) <= num_layers:
            raise ConfigError(
                f"expected distinct eagle_aux_hidden_state_layer_ids from 1 to {num_layers}, got {ids}: the output of "
                f"0-based layer i is i + 1, and {num_layers} the last hidden state"
            )
        options = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        directory = Path(options.pop("target", None) or vllm_config.model_config.model)
        groups = kv_cache_config.kv_cache_groups
        found = [n for n, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
        if not found and len(groups) == 1:
            found = [0]
        if len(found) != 1:
            raise ConfigError(
                f"expected one group of cache blocks with hidden states, vLLM made {len(found)} of {len(groups)}: it "
                "cannot extract those of this model"
            )
        return cls(
            directory=directory,
            # the model appends them as its layers run
            ids=tuple(sorted(ids)),
            num_layers=num_layers,
            dtype=vllm_config.model_config.dtype,
            limits=read_limits(options),
            group=found[0],
            block_size=groups[found[0]].kv_cache_spec.block_size,
        )

    def norm(self) -> FinalNorm | None:
        """``None`` where the last hidden state is not extracted, or its norm is not known."""
        if self.num_layers not in self.ids:
            return None
        try:
            return read_final_norm(self.directory, self.dtype)
        except TargetError as error:
            logger.warning("SpecForge: no last hidden states: %s", error)
            return None

    def rows(self, spec: CaptureSpec) -> list[int]:
        """Where the cache has the layers of ``spec``, and behind them its last hidden state."""
        wanted = [layer + 1 for layer in spec.aux_layers] + [self.num_layers] * spec.last_hidden
        return [self.ids.index(layer) for layer in wanted]


class SpecForgeConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the top of this file. vLLM makes one in its scheduler and one in every worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        setup = _Setup.of(vllm_config, kv_cache_config)
        self._orders = _Orders(setup, _server_info(setup, vllm_config)) if role is KVConnectorRole.SCHEDULER else None
        self._blocks = _Blocks(setup) if role is KVConnectorRole.WORKER else None

    @property
    def requires_kv_delivery(self) -> bool:
        """A preempted request is captured again, or was: no finished one has to be computed anew."""
        return False

    # ---- in the worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        assert self._blocks is not None
        self._blocks.bind(kv_caches, self._kv_cache_config)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._blocks is not None
        if isinstance(connector_metadata, StepOrders):
            self._blocks.start_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Called behind every write to a layer's cache: of the hidden states', the written slots are noted."""
        assert self._blocks is not None
        self._blocks.note_written(layer_name, attn_metadata)

    def wait_for_save(self) -> None:
        """The end of a step, in which all hidden states have been written."""
        assert self._blocks is not None
        if self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            if isinstance(metadata, StepOrders):
                self._blocks.end_step(metadata)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self._blocks is not None
        outcomes = self._blocks.collect()
        return StepOutcomes(outcomes) if outcomes else None

    def get_finished_count(self) -> int:
        return 1

    def shutdown(self) -> None:
        if self._blocks is not None:
            self._blocks.close()

    # ---- in the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded into the blocks."""

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        assert self._orders is not None
        self._orders.pool = gpu_block_pool

    def on_new_request(self, request: Any) -> None:
        assert self._orders is not None
        self._orders.add(request)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._orders is not None
        return self._orders.of_step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._orders is not None
        if isinstance(connector_output.kv_connector_worker_meta, StepOutcomes):
            self._orders.note(connector_output.kv_connector_worker_meta.outcomes)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._orders is not None
        return False, self._orders.finish(request.request_id, request.status in WHOLE)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """The hidden states of a token side by side."""
        return "LBNHC"


@dataclass
class _Pending:
    order: Order
    token_ids: list[int]
    is_sent: bool = False
    blocks: frozenset[int] = frozenset()
    outcome: Outcome | None = None


class _Orders:
    """The scheduler's side: the orders of the requests that it has, by request id."""

    def __init__(self, setup: _Setup, info: ServerInfo) -> None:
        self._setup = setup
        self._info = info
        self._pending: dict[str, _Pending] = {}
        self.pool: Any = None
        """vLLM's blocks."""

    def add(self, request: Any) -> None:
        """Read the order of a request that comes with one. Never raises: what is wrong is said in the receipt."""
        parameters = request.kv_transfer_params
        if not isinstance(parameters, dict) or FIELD not in parameters:
            return
        token_ids = request.prompt_token_ids
        pending = _Pending(Order(), [])
        try:
            pending.order = read_order(parameters[FIELD])
            self._check(pending.order, token_ids)
            pending.token_ids = list(token_ids or ())
        except Exception as error:  # noqa: BLE001 - the engine must survive
            pending.outcome = Outcome(refusal=refusal_of(error))
        self._pending[request.request_id] = pending

    def of_step(self, scheduled: Any) -> StepOrders:
        """What the worker has to do in the step of ``scheduled``."""
        step = StepOrders(copies=[(int(old), int(new)) for old, new in scheduled.kv_cache_block_copies or ()])
        group, block_size = self._setup.group, self._setup.block_size
        for new in scheduled.scheduled_new_reqs:
            step.fresh_blocks += new.block_ids[group][new.num_computed_tokens // block_size :]
            self._advance(step, scheduled, new.req_id, new.num_computed_tokens)
        cached = scheduled.scheduled_cached_reqs
        for request_id, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if blocks is not None:
                # of a request that was preempted these are all, the first of them from the prefix cache
                num_kept = num_computed // block_size if request_id in cached.resumed_req_ids else 0
                step.fresh_blocks += blocks[group][num_kept:]
            self._advance(step, scheduled, request_id, num_computed)
        return step

    def note(self, outcomes: dict[str, Outcome]) -> None:
        for request_id, outcome in outcomes.items():
            pending = self._pending.get(request_id)
            if pending is not None:
                pending.outcome = outcome
                if outcome.refusal == UNWRITTEN:
                    # or the next request with these tokens would find them in the prefix cache, and fail as well
                    self.pool.evict_blocks(set(pending.blocks))

    def finish(self, request_id: str, is_whole: bool) -> dict[str, Any] | None:
        """The receipt; ``None`` for a request without an order. ``is_whole``: it ended by itself, nobody gave it up."""
        pending = self._pending.pop(request_id, None)
        if pending is None:
            return None
        outcome = pending.outcome
        if outcome is None and pending.order != Order():
            reason = (
                "the request ended before its order was carried out; ask for a completion of "
                f"{NUM_HOLD_TOKENS} tokens that nothing ends earlier"
            )
            outcome = Outcome(refusal=Refusal("request" if is_whole else "busy", reason))
        outcome = outcome or Outcome()
        receipt = Receipt(self._info, outcome.item, outcome.refusal, outcome.data)
        return {FIELD: json.loads(RECEIPT.write(receipt))}

    def _advance(self, step: StepOrders, scheduled: Any, request_id: str, num_computed: int) -> None:
        """Hand over the order of a request whose prompt is complete behind this step, once."""
        pending = self._pending.get(request_id)
        if pending is None or pending.is_sent or pending.outcome is not None or pending.order == Order():
            return
        if pending.order.close is not None:
            step.closes.append((request_id, pending.order.close.sink))
        elif num_computed + scheduled.num_scheduled_tokens[request_id] < len(pending.token_ids):
            return
        elif pending.order.capture is not None:
            groups = scheduled.kv_connector_block_state.resolve_block_ids(request_id)
            pending.blocks = frozenset(block for group in groups for block in group)
            blocks = list(groups[self._setup.group])
            step.captures.append(CaptureBlocks(request_id, pending.order.capture, pending.token_ids, blocks))
        pending.is_sent = True

    def _check(self, order: Order, token_ids: list[int] | None) -> None:
        request, info = order.capture, self._info
        if request is None:
            return
        if not token_ids:
            raise ContractError("expected a prompt of token ids, got none")
        ids = [layer + 1 for layer in request.spec.aux_layers]
        check_capture(request, info, f"start vLLM with eagle_aux_hidden_state_layer_ids that have {ids}")
        if request.spec.last_hidden and not info.last_hidden:
            raise ContractError(
                "the last hidden state is not captured here; start vLLM with eagle_aux_hidden_state_layer_ids that "
                f"have {self._setup.num_layers} (a target whose final norm is known)"
            )


class _Blocks:
    """The worker's side: the cache of hidden states [B, L, P, H], and what in it has been written."""

    def __init__(self, setup: _Setup) -> None:
        self._setup = setup
        self._cache = torch.empty(0)
        self._layer_name = ""
        self._written = torch.empty(0)
        """bool [B, P]: written to since the block was last given to a request."""
        self._recorder: Recorder | None = None

    def bind(self, kv_caches: dict[str, Tensor], kv_cache_config: Any) -> None:
        if get_tensor_model_parallel_rank() != 0:
            return  # every rank has the same hidden states
        names = kv_cache_config.kv_cache_groups[self._setup.group].layer_names
        own = [name for name in names if "cache_only_layers" in name]
        shapes = [tuple(kv_caches[name].shape) for name in own]
        if len(own) != 1 or shapes[0][1:3] != (len(self._setup.ids), self._setup.block_size):
            raise ConfigError(
                f"expected one cache of hidden states [blocks, {len(self._setup.ids)}, {self._setup.block_size}, "
                f"hidden], vLLM {vllm.__version__} has {shapes}: this version lays it out in another way"
            )
        self._layer_name, self._cache = own[0], kv_caches[own[0]]
        device = self._cache.device
        self._written = torch.zeros(self._cache.shape[0], self._setup.block_size, dtype=torch.bool, device=device)
        norm = self._setup.norm()
        norm = norm and dataclasses.replace(norm, weight=norm.weight.to(device))
        self._recorder = Recorder(self._setup.limits, norm, named="{} of kv_connector_extra_config".format)

    def start_step(self, orders: StepOrders) -> None:
        if self._recorder is None:
            return
        self._recorder.start_step()
        device = self._written.device
        old, new = torch.tensor(orders.copies, dtype=torch.long, device=device).view(-1, 2).unbind(dim=1)
        copied = self._written[old]
        self._written[torch.tensor(orders.fresh_blocks, dtype=torch.long, device=device)] = False
        self._written[new] = copied

    def note_written(self, layer_name: str, attn_metadata: Any) -> None:
        if layer_name == self._layer_name:
            # padding has slot -1, which goes to the first block: no request ever gets that
            self._written.view(-1)[attn_metadata.slot_mapping.clamp_min(0)] = True

    def end_step(self, orders: StepOrders) -> None:
        if self._recorder is None:
            return
        for request_id, sink in orders.closes:
            self._recorder.submit_close(request_id, sink)
        for capture in orders.captures:
            try:
                hidden = self._hidden(capture)
            except Exception as error:  # noqa: BLE001 - the engine must survive
                refusal = Refusal("engine", f"{type(error).__name__}: {error}")
                self._recorder.answer(capture.request_id, refusal)
                continue
            if hidden is None:
                self._recorder.answer(capture.request_id, UNWRITTEN)
            else:
                self._recorder.submit_capture(capture.request_id, capture.request, capture.token_ids, hidden)

    def collect(self) -> dict[str, Outcome]:
        return self._recorder.collect() if self._recorder is not None else {}

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()

    def _hidden(self, capture: CaptureBlocks) -> Tensor | None:
        """A copy of the hidden states [n, S, H] that were asked for; ``None`` where not all of them were written."""
        num_tokens, block_size, device = len(capture.token_ids), self._setup.block_size, self._cache.device
        num_blocks = -(-num_tokens // block_size)
        blocks = torch.tensor(capture.block_ids[:num_blocks], device=device)
        if len(blocks) < num_blocks or not bool(self._written[blocks].view(-1)[:num_tokens].all()):
            return None
        rows = torch.tensor(self._setup.rows(capture.request.spec), device=device)
        found = self._cache[blocks[None, :], rows[:, None]]
        return found.view(len(rows), num_blocks * block_size, -1)[:, :num_tokens]


def _check_engine(vllm_config: Any) -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
    if version < OLDEST:
        raise ConfigError(
            f"capture needs vLLM {'.'.join(map(str, OLDEST))} or newer, this is {vllm.__version__}; upgrade it"
        )
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "extract_hidden_states":
        raise ConfigError("capture needs --speculative-config with the method extract_hidden_states")
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
        raise ConfigError(
            "capture works with tensor parallelism alone; start a server for every data-parallel replica, without "
            "pipeline stages"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError(
            "capture needs all tokens of a prompt in every rank; start vLLM without context parallelism (decode and "
            "prefill)"
        )


def _server_info(setup: _Setup, vllm_config: Any) -> ServerInfo:
    model = vllm_config.model_config
    if not setup.directory.is_dir():
        raise ConfigError(
            f"{setup.directory} is not a directory: serve the target from a local one, or name it as 'target' in "
            "kv_connector_extra_config (its weights are what features are checked by)"
        )
    return ServerInfo(
        protocol=PROTOCOL,
        engine="vllm",
        engine_version=f"{vllm.__version__} on {vllm_config.device_config.device_type}",
        target_revision=read_revision(setup.directory),
        num_layers=setup.num_layers,
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        dtype=str(model.dtype).removeprefix("torch."),
        layers=tuple(layer - 1 for layer in setup.ids if layer),
        last_hidden=setup.norm() is not None,
        sinks=sinks_of(setup.limits),
        strict=False,
        max_tokens=model.max_model_len - NUM_SPARE_TOKENS,
        max_in_flight=vllm_config.scheduler_config.max_num_seqs,
    )
