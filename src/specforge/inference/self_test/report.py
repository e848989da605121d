"""What a self-test says: every check with its figures, and the conventions that are broken."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from specforge.contracts.capture_server import ServerInfo
from specforge.errors import CaptureTestFailed

Verdict = Literal["passed", "warning", "failed", "unverified"]

CONVENTIONS: dict[str, str] = {
    "answers": "it does not capture ordinary prompts: read the reasons, and the server's log",
    "finite": "features are NaN or infinite: serve the target in the number format that it was trained in",
    "zeros": "features are zeros, so nothing was captured there: tokens of cached prefixes are left out, or the layer "
    "does not exist on the device that writes; switch the engine's prefix cache off, or update its plug-in",
    "constant": "features do not differ from token to token or from channel to channel: a buffer is written that "
    "nothing was captured into",
    "token_ids": "input_ids are not those that were asked for: samples are mixed up, or the server adds tokens such as "
    "a BOS of its own; send prompts as token ids, without special tokens added",
    "previous_request": "features of the previous request are given: a buffer is read before it is filled",
    "other_sample": "features of another sample are given: samples of one batch, or requests in flight, are mixed up",
    "not_repeatable": "the same prompt gives other features the next time: the engine draws (dropout, routing with "
    "noise) or reads a buffer too early",
    "batch": "features of a sample depend on what else is captured with it: switch batching off, make the engine "
    "deterministic, or let it say strict: false and stay within rounding",
    "stale": "features do not depend on the tokens: an old buffer or one fixed prompt is given",
    "row_late": "features are one row late, row i holds the features of token i - 1: the plug-in drops or adds a row "
    "at the start",
    "row_early": "features are one row early, row i holds the features of token i + 1: the plug-in cuts the first row",
    "not_causal": "features of a token depend on the tokens after it, or not on its own: the target is served with "
    "another attention mask, or rows are mixed up",
    "long_prompt": "a long prompt has other first rows than those rows have alone, or rows without features: what is "
    "computed in several steps is put together wrongly, or windows or RoPE change with the length",
    "same_layer": "two captured layers are the same one: the list of layer ids was not converted id by id",
    "norm_missing": "last is the state before the final norm, expected is the one after it: apply the target's final "
    "norm before the features are written",
    "norm_twice": "the final norm was applied twice to last: apply it once",
    "not_last": "last is not the last hidden state of the target: its head makes other next tokens of it than the "
    "engine generates",
    "layer_order": "the layers of aux are in another order than they were asked for: write them in the order of the "
    "request",
    "wrong_layer": "outputs of other layers than those that were asked for are given: ids mean outputs of 0-based "
    "decoder layers (vLLM: id + 1, SGLang: id); give the engine the ids that are meant",
    "numerics": "features are of the right layer, but far from what transformers computes: the engine quantises, or "
    "computes positions, attention windows or a scaling in another way",
}
"""What each convention that can be broken means, and what to do. ``docs/howto/self-test.md`` has a row for each."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``measured``: figures by name; ``broken``: the conventions of ``CONVENTIONS`` that
    failed; ``where`` says where that was seen, what to beware of, or why nothing could be verified.
    """

    name: str
    verdict: Verdict
    measured: dict[str, float | str]
    broken: tuple[str, ...] = ()
    where: str = ""


def passed(name: str, **measured: float | str) -> Check:
    return Check(name, "passed", measured)


def failed(name: str, broken: str, where: str, **measured: float | str) -> Check:
    assert broken in CONVENTIONS, broken
    return Check(name, "failed", measured, (broken,), where)


def warning(name: str, where: str, **measured: float | str) -> Check:
    return Check(name, "warning", measured, (), where)


def unverified(name: str, why: str, **measured: float | str) -> Check:
    return Check(name, "unverified", measured, (), why)


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """The checks of one server, in order. Those behind a failure that makes them meaningless are left out."""

    url: str
    info: ServerInfo
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.broken

    @property
    def broken(self) -> tuple[str, ...]:
        """The broken conventions, each once, in the order in which they were found."""
        return tuple(dict.fromkeys(name for check in self.checks for name in check.broken))

    @property
    def sentences(self) -> tuple[str, ...]:
        """A sentence for every broken convention, with the places where it was seen."""
        found = []
        for name in self.broken:
            places = dict.fromkeys(check.where for check in self.checks if name in check.broken)
            found.append(f"{CONVENTIONS[name]} ({'; '.join(places)})")
        return tuple(found)

    def raise_if_failed(self) -> None:
        """Raise ``CaptureTestFailed`` with a sentence for every broken convention."""
        if not self.passed:
            listed = "".join(f"\n  * {sentence}" for sentence in self.sentences)
            raise CaptureTestFailed(
                f"the capture server {self.url} ({self.info.engine} {self.info.engine_version}) failed the self-test; "
                f"a draft that learns from it would learn nonsense:{listed}"
            )

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "url": self.url,
            "passed": self.passed,
            "broken": list(self.broken),
            "sentences": list(self.sentences),
            "info": asdict(self.info),
            "checks": [asdict(check) for check in self.checks],
        }
