"""What the connector keeps account of, without an engine: run by the interpreter that has vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.request import RequestStatus

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CaptureItem, CaptureRequest, InlineSink, ServerInfo
from specforge.inference.plugins.orders import FIELD, Order, write_order
from specforge.inference.plugins.recorder import Recorder, RecorderLimits
from specforge.inference.plugins.vllm_connector import WHOLE, StepOrders, _Blocks, _Orders, _Setup

SETUP = _Setup(Path(), (2, 4), 8, torch.float32, RecorderLimits(), 0, 4)
INFO = ServerInfo(1, "vllm", "0", "revision", 8, 4, 32, "float32", (1, 3), False, ("inline",), False, 100, 8)


def copied_blocks_are_as_written_as_their_source() -> None:
    blocks = _Blocks(SETUP)
    blocks._recorder = Recorder(RecorderLimits(), None)
    blocks._written = torch.zeros(6, 4, dtype=torch.bool)
    blocks._written[1, :3] = blocks._written[2] = True
    nothing = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    copies = [KVCacheBlockCopy(src_block_id=1, dst_block_id=3)]
    step = _Orders(SETUP, INFO).of_step(
        SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=nothing, kv_cache_block_copies=copies)
    )
    step.fresh_blocks = [2, 3]
    blocks.start_step(step)
    assert blocks._written[3].tolist() == [True, True, True, False]
    assert not blocks._written[2].any()
    blocks.start_step(StepOrders())
    blocks.close()


def requests_that_are_given_up_are_nobodys_fault() -> None:
    orders = _Orders(SETUP, INFO)
    asked = CaptureRequest((CaptureItem("a", 1, ()),), CaptureSpec((1,), False), InlineSink())
    parameters = {FIELD: write_order(Order(capture=asked))}
    for status, what in (
        (RequestStatus.FINISHED_ABORTED, "busy"),
        (RequestStatus.FINISHED_ERROR, "busy"),
        (RequestStatus.FINISHED_STOPPED, "request"),
        (RequestStatus.FINISHED_LENGTH_CAPPED, "request"),
    ):
        orders.add(SimpleNamespace(kv_transfer_params=parameters, prompt_token_ids=[1, 2], request_id="r"))
        receipt = orders.finish("r", status in WHOLE)
        assert receipt is not None
        assert receipt[FIELD]["refusal"]["what"] == what


if __name__ == "__main__":
    copied_blocks_are_as_written_as_their_source()
    requests_that_are_given_up_are_nobodys_fault()
