"""An SGLang server that captures. The only file that knows SGLang's inside.

SGLang loads it through the entry point ``sglang.srt.plugins`` of the installed specforge, in every process of a server,
and it hooks two functions by SGLang's own hook registry (``docs/howto/sglang-capture.md``). Started with
``--enable-return-aux-hidden-states``, SGLang keeps the outputs of the named layers and the last hidden states of every
token of a forward. Of requests whose id begins with ``RID_PREFIX`` those rows become an *auxiliary output*: SGLang
copies it to the host with the sampled tokens and hands it back right before it sends the answer. There the rows of the
prompt are put, and the receipt is added to the answer. What SGLang computes next runs meanwhile (its overlap schedule).

SGLang's layer ids are ours: the outputs of 0-based layers. Its last hidden states are behind the final norm.

Legend: T tokens of a forward, S tokens of a prompt, n layers that SGLang captures, H hidden size.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specforge.contracts.capture_server import PROTOCOL, ServerInfo
from specforge.contracts.capture_wire import Refusal
from specforge.errors import ConfigError, ContractError, SpecForgeError, TargetError
from specforge.inference.plugins.orders import FIELD, RECEIPT, Receipt, check_capture, read_order, refusal_of
from specforge.inference.plugins.recorder import Outcome, Recorder, RecorderLimits, read_limits, sinks_of
from specforge.inference.plugins.target_files import read_revision

TESTED = ("0.5.23",)
"""Versions of SGLang that the hooks were tested with. Others are refused: they may have moved what is hooked."""

RID_PREFIX = "specforge-"
"""Of the ids of requests that come with an order."""

OPTIONS = ("feature_dirs", "advertise_host", "max_sinks", "max_feature_bytes", "max_inline_bytes", "sink_idle_s")
"""As SGLang passes a plug-in no options, these are environment variables (:func:`variable_of`)."""

logger = logging.getLogger("sglang.specforge")

_captures: list[_Capture] = []
"""Of this process: none, or that of its scheduler."""


def register() -> None:
    """Hook the capture into this process. SGLang logs what this raises, and goes on without.

    Raises ``ConfigError`` for a version of it that was not tested.
    """
    import sglang  # noqa: PLC0415 - there inside SGLang alone
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415

    check_version(sglang.__version__)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", _scheduler_made, HookType.AFTER)
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.sample", _sampled, HookType.AFTER)


def check_version(version: str) -> None:
    """Raise ``ConfigError`` unless ``version`` of SGLang is one of those tested."""
    if version.partition("+")[0] not in TESTED:
        raise ConfigError(
            f"SpecForge's capture was tested with SGLang {', '.join(TESTED)}, this is {version}; install one of these, "
            "or a specforge that knows this version"
        )


@dataclass(frozen=True)
class Rows:
    """What one forward gave for one request: rows from token ``start`` of it on.

    ``index``: its place in the batch. ``aux`` [S', n*H] and ``last`` [S', H], ``None`` where SGLang kept none.
    """

    index: int
    rid: str
    start: int
    aux: Tensor | None
    last: Tensor | None


@dataclass(frozen=True)
class DeviceRows:
    """SGLang's ``DeviceAuxiliaryOutput``: rows where they were computed."""

    rows: Sequence[Rows]
    consume: Callable[[Any, Sequence[Rows], Sequence[Any]], None]

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> HostRows:
        def copied(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copy_tensor(tensor)

        found = [Rows(row.index, row.rid, row.start, copied(row.aux), copied(row.last)) for row in self.rows]
        return HostRows(found, self.consume)


@dataclass(frozen=True)
class HostRows:
    """SGLang's ``HostAuxiliaryOutput``: the rows on the host, copied when SGLang calls :meth:`consume`."""

    rows: Sequence[Rows]
    consume_rows: Callable[[Any, Sequence[Rows], Sequence[Any]], None]

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """``commits``: for each request of ``batch`` the tokens that it got, ``None`` while its prompt is not whole."""
        self.consume_rows(batch, self.rows, commits)


@dataclass
class _Prompt:
    """The hidden states of a prompt, as far as they are known: [n + 1, S, H], those behind the norm last."""

    hidden: Tensor
    is_known: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.is_known = torch.zeros(self.hidden.shape[1], dtype=torch.bool)

    def add(self, rows: Rows) -> None:
        assert rows.last is not None
        stop = min(rows.start + rows.last.shape[0], self.hidden.shape[1])
        wanted = slice(rows.start, stop)
        num_rows = max(0, stop - rows.start)
        self.hidden[-1, wanted] = rows.last[:num_rows]
        if rows.aux is not None:
            num_layers, _, width = self.hidden.shape
            layers = rows.aux[:num_rows].view(num_rows, num_layers - 1, width)
            self.hidden[:-1, wanted] = layers.transpose(0, 1)
        self.is_known[wanted] = True


class _Capture:
    """What one scheduler process of SGLang captures: see the top of this file."""

    def __init__(self, info: ServerInfo, recorder: Recorder) -> None:
        self._info = info
        self._recorder = recorder
        self._prompts: WeakKeyDictionary[Any, _Prompt] = WeakKeyDictionary()
        self._lost: WeakKeyDictionary[Any, Exception] = WeakKeyDictionary()
        """Requests of which rows were lost, and why, before the prompt was whole."""

    def rows_of(self, output: Any, forward: Any) -> DeviceRows | None:
        """The rows of ``forward`` that are ours, copied on the device: its buffers are used again."""
        rids = forward.rids or ()
        if not any(rid.startswith(RID_PREFIX) for rid in rids):
            return None
        found: list[Rows] = []
        offset = 0
        for index, (rid, length, start) in enumerate(
            zip(rids, forward.extend_seq_lens_cpu, forward.extend_prefix_lens_cpu, strict=False)
        ):
            if rid.startswith(RID_PREFIX):
                rows = slice(offset, offset + length)
                aux, last = output.hidden_states, output.last_hidden_states
                # it keeps the last ones beside auxiliary ones alone, and else in their place
                found.append(
                    Rows(
                        index,
                        rid,
                        start,
                        None if aux is None or last is None else aux[rows].clone(),
                        None if last is None else last[rows].clone(),
                    )
                )
            offset += length
        return DeviceRows(found, self.consume)

    def consume(self, batch: Any, rows: Sequence[Rows], commits: Sequence[Any]) -> None:
        """Take ``rows`` in; record the prompts that are whole, and add their receipts. Never raises."""
        try:
            self._take_in(batch, rows, commits)
            self._recorder.start_step()
            outcomes = self._recorder.collect()
            lost = Outcome()
        except Exception as error:
            logger.exception("SpecForge: the rows of a step are lost")
            outcomes, lost = {}, Outcome(refusal=Refusal("engine", f"{type(error).__name__}: {error}"))
        rids = {row.rid for row in rows}
        for request, commit in zip(batch.reqs, commits, strict=False):
            if commit is None or request is None or request.rid not in rids:
                continue
            self._prompts.pop(request, None)
            outcome = outcomes.get(request.rid, lost)
            try:
                receipt = RECEIPT.write(Receipt(self._info, outcome.item, outcome.refusal, outcome.data)).decode()
            except Exception as error:  # noqa: BLE001 - the engine must survive
                receipt = RECEIPT.write(Receipt(self._info, refusal=refusal_of(error))).decode()
            request.customized_info = (request.customized_info or {}) | {FIELD: [receipt]}

    def _take_in(self, batch: Any, rows: Sequence[Rows], commits: Sequence[Any]) -> None:
        for row in rows:
            request = batch.reqs[row.index]
            try:
                self._add(request, row)
            except Exception as error:  # noqa: BLE001 - one request's failure
                self._lost[request] = error
            if commits[row.index] is not None:
                try:
                    self._submit(request)
                except Exception as error:  # noqa: BLE001 - one request's failure
                    self._recorder.answer(row.rid, refusal_of(error))

    def _add(self, request: Any, rows: Rows) -> None:
        if request.rid != rows.rid:
            raise RuntimeError(f"SGLang gave the rows of {rows.rid} for request {request.rid}")
        if rows.last is None:
            return
        prompt = self._prompts.get(request)
        if prompt is None:
            num_layers = len(self._info.layers or ())
            shape = (num_layers + 1, len(request.origin_input_ids), self._info.hidden_size)
            prompt = self._prompts[request] = _Prompt(torch.empty(shape, dtype=rows.last.dtype))
        prompt.add(rows)

    def _submit(self, request: Any) -> None:
        """Carry out the order of a request whose prompt is whole."""
        lost = self._lost.pop(request, None)
        if lost is not None:
            raise lost
        order = read_order(_order_of(request.sampling_params.custom_params))
        if order.close is not None:
            self._recorder.submit_close(request.rid, order.close.sink)
        if order.capture is not None:
            asked = " ".join(map(str, sorted(order.capture.spec.aux_layers)))
            more_layers = f"start SGLang with --return-aux-hidden-state-layer-ids {asked}"
            check_capture(order.capture, self._info, more_layers)
            prompt = self._prompts.get(request)
            if prompt is None or not bool(prompt.is_known.all()):
                known = 0 if prompt is None else int(prompt.is_known.sum())
                raise ContractError(
                    f"SGLang computed {known} of {len(request.origin_input_ids)} tokens of this prompt, the others are "
                    "in its prefix cache; ask with an extra_key of its own, or start it with --disable-radix-cache"
                )
            layers, spec = list(self._info.layers or ()), order.capture.spec
            wanted = [layers.index(layer) for layer in spec.aux_layers] + [len(layers)] * spec.last_hidden
            token_ids = list(request.origin_input_ids)
            self._recorder.submit_capture(request.rid, order.capture, token_ids, prompt.hidden[wanted])


def _scheduler_made(_result: Any, scheduler: Any, *_arguments: Any, **_options: Any) -> None:
    """Behind ``Scheduler.__init__``: the model is loaded, nothing has been served."""
    from sglang.srt.runtime_context import get_parallel  # noqa: PLC0415

    if get_parallel().tp_rank != 0:
        return  # every rank has the same hidden states
    try:
        limits = limits_of(os.environ)
        info = _server_info(scheduler, limits)
    except SpecForgeError as error:
        logger.error("SpecForge: no capture: %s", error)  # noqa: TRY400 - the message says it all
        return
    recorder = Recorder(limits, _as_it_is, named=variable_of)
    atexit.register(recorder.close)
    _captures[:] = [_Capture(info, recorder)]
    logger.info(
        "SpecForge: layers %s and the last hidden states can be captured, of revision %.16s",
        list(info.layers or ()),
        info.target_revision,
    )


def _sampled(_result: Any, _runner: Any, logits_output: Any, forward_batch: Any) -> None:
    """Behind ``ModelRunner.sample``: a forward is done, and its tokens are drawn."""
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output  # noqa: PLC0415

    if not _captures or not forward_batch.forward_mode.is_extend():
        return
    rows = _captures[0].rows_of(logits_output, forward_batch)
    logits_output.auxiliary_device_output = append_auxiliary_output(logits_output.auxiliary_device_output, rows)


def _server_info(scheduler: Any, limits: RecorderLimits) -> ServerInfo:
    """What the server of ``scheduler`` is. Raises ``ConfigError`` or ``TargetError`` for one that cannot capture."""
    import sglang  # noqa: PLC0415
    from sglang.srt.runtime_context import get_disagg, get_exec, get_model, get_parallel  # noqa: PLC0415

    features, parallel, model = get_exec().features, get_parallel(), scheduler.model_config
    layers = features.return_aux_hidden_state_layer_ids
    if features.aux_hidden_state_capture is None or not layers:
        raise ConfigError(
            "SGLang keeps no hidden states; start it with --enable-return-aux-hidden-states --speculative-algorithm "
            "EAGLE3 --return-aux-hidden-state-layer-ids and the layers of the run"
        )
    for name in ("dp_size", "attn_dp_size", "attn_cp_size", "pp_size"):
        if getattr(parallel, name) > 1:
            raise ConfigError(
                f"capture works with tensor parallelism alone, {name} is {getattr(parallel, name)}; start a server for "
                "every replica"
            )
    if get_disagg().disaggregation_mode != "null":
        raise ConfigError("capture needs prefill and decode in one server; start it without --disaggregation-mode")
    directory = Path(get_model().model_path)
    if not directory.is_dir():
        raise TargetError(f"{directory} is not a directory; serve the target from a local one")
    return ServerInfo(
        protocol=PROTOCOL,
        engine="sglang",
        engine_version=sglang.__version__,
        target_revision=read_revision(directory),
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        # SGLang captures as its layers run
        layers=tuple(sorted(layers)),
        last_hidden=True,
        sinks=sinks_of(limits),
        strict=False,
        max_tokens=scheduler.max_req_input_len - 1,
        max_in_flight=scheduler.max_running_requests,
    )


def _order_of(custom_params: Any) -> Any:
    """The JSON in the text that SGLang passed through; it passes no nested objects."""
    try:
        return json.loads(custom_params[FIELD])
    except (KeyError, TypeError, ValueError):
        raise ContractError(f"expected custom_params with the text of a JSON object as {FIELD!r}") from None


def variable_of(option: str) -> str:
    """The environment variable of an option: ``SPECFORGE_FEATURE_DIRS`` (separated by ``:``), ..."""
    return f"SPECFORGE_{option.upper()}"


def limits_of(environment: Mapping[str, str]) -> RecorderLimits:
    """From the variables of ``OPTIONS``. Raises ``ConfigError`` for what is none of their values."""
    options: dict[str, Any] = {}
    for option in OPTIONS:
        text = environment.get(variable_of(option))
        if not text:
            continue
        if option == "feature_dirs":
            options[option] = [path for path in text.split(os.pathsep) if path]
        elif option == "advertise_host":
            options[option] = text
        elif text.isdigit():
            options[option] = int(text)
        else:
            raise ConfigError(f"{variable_of(option)}: expected a whole number, got {text!r}")
    return read_limits(options)


def _as_it_is(hidden: Tensor) -> Tensor:
    """SGLang has applied the final norm."""
    return hidden
