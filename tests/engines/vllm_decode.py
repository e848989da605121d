"""Decodes prompts in vLLM. Runs in the engines' environment: ``python vllm_decode.py REQUEST.json ANSWER.json``.

The request has ``target``, ``prompts`` (token ids), ``max_new_tokens`` and ``speculative`` (vLLM's speculative
configuration, ``null`` for none). The answer has the new tokens of each prompt and the engine's own counters.
"""

import json
import sys
from pathlib import Path
from typing import Any


def decode(request: dict[str, Any]) -> dict[str, Any]:
    """One prompt at a time: the shape of a forward does not depend on the other prompts."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=request["target"],
        speculative_config=request["speculative"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        disable_log_stats=False,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_new_tokens"], detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    counters = {metric.name: metric for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode")}
    answer: dict[str, Any] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if counters:
        for name in ("drafts", "draft_tokens", "accepted_tokens"):
            answer[f"num_{name}"] = int(counters[f"vllm:spec_decode_num_{name}"].value)
        answer["accepted_per_position"] = list(counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values)
    return answer


if __name__ == "__main__":
    request_file, answer_file = map(Path, sys.argv[1:])
    answer_file.write_text(json.dumps(decode(json.loads(request_file.read_text()))))
