"""The self-test of one capture server: what it gives is compared with itself, with the target's head and norm, with
what its engine generates, and with a copy of the target where there is one.

The checks come in groups. Where one of a group fails, those behind it would only repeat it in other words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from specforge.contracts.capture_server import ServerInfo
from specforge.errors import SpecForgeError
from specforge.inference.rope import length_of_short_rope
from specforge.inference.self_test import basics, meaning
from specforge.inference.self_test.evidence import CaptureFailed, Evidence, SelfTest, collect, long_tokens_of
from specforge.inference.self_test.final_norm import PossibleNorm, read_final_norms
from specforge.inference.self_test.prompts import PromptSet, choose_prompts
from specforge.inference.self_test.report import Check, SelfTestReport, failed, passed
from specforge.inference.servers.base import CaptureServer, check_info

FEATURES_ALONE = (
    (basics.finite,),
    (basics.not_zero, basics.token_ids),
    (basics.not_constant,),
    (basics.repeatable,),
    (basics.at_once, basics.joined),
    (basics.distinct_layers, basics.prefixes, basics.own_rows),
    (basics.long_prompt,),
)


def self_test(server: CaptureServer, test: SelfTest) -> SelfTestReport:
    """The report on ``server``; nothing that it wrote is left.

    Raises ``ServerUnavailable`` where it does not answer, ``ServerRefused`` where it says itself that it cannot serve.
    """
    info = server.info(test.timeout_s)
    check_info(server.url, info, test.target, test.spec, test.sink)
    long_tokens = long_tokens_of(test, info.max_tokens, _short_rope(test))
    prompts = choose_prompts(test.prompts, test.target, test.tables.embed_tokens, info.max_tokens, long_tokens)
    try:
        evidence = collect(server, info, test, prompts)
    except CaptureFailed as error:
        return SelfTestReport(server.url, info, (failed("answers", "answers", str(error)),))
    checks = [_answered(info, prompts)]
    for group in _groups(test):
        checks += group(evidence)
        if any(check.verdict == "failed" for check in checks):
            break
    return SelfTestReport(server.url, info, tuple(checks))


def _groups(test: SelfTest) -> Iterator[Callable[[Evidence], Iterable[Check]]]:
    for group in FEATURES_ALONE:
        yield lambda evidence, group=group: [check(evidence) for check in group]  # type: ignore[misc]
    norms = read_final_norms(_directory(test), test.target)
    yield lambda evidence: _compared(evidence, test, norms)
    yield lambda evidence: [meaning.final_norm(evidence, test.tables, norms)]
    yield lambda evidence: [meaning.next_tokens(evidence, test.tables, norms)]


def _compared(evidence: Evidence, test: SelfTest, norms: list[PossibleNorm]) -> list[Check]:
    computed = _computed(evidence, test)
    return [meaning.layers(evidence, computed), meaning.last_state(evidence, computed, norms)]


def _computed(evidence: Evidence, test: SelfTest) -> meaning.Computed | str:
    """What the oracle computes, or why there is nothing: a copy that cannot run here says nothing of the server."""
    if test.oracle is None:
        return "there is no oracle"
    try:
        return meaning.Computed(test.oracle, evidence, test.tables)
    except Exception as error:  # noqa: BLE001 - kernels of quantised targets raise what they like
        kind = "" if isinstance(error, SpecForgeError) else f"{type(error).__name__}: "
        return f"the target does not run here ({kind}{error!s:.300})"


def _directory(test: SelfTest) -> Path:
    return test.tables.directory or Path(test.target.path)


def _short_rope(test: SelfTest) -> int | None:
    try:
        config = json.loads((_directory(test) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # a target with towers has its decoder's configuration inside
    return length_of_short_rope({**config, **config.get("text_config", {})})


def _answered(info: ServerInfo, prompts: PromptSet) -> Check:
    tokens = sum(map(len, prompts.rows))
    return passed("answers", prompts=len(prompts.rows), tokens=tokens, strict=str(info.strict).lower())
