"""The self-test of capture servers: a right one passes, and each silent fault is refused by its name."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge.algorithms.parts.tables import load_target_tables
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import InlineSink, ItemFailure, SharedDirSink
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.demo.run import PACKAGED_TARGET
from specforge.errors import CaptureTestFailed, ServerRefused, ServerUnavailable, TargetError
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.self_test.evidence import SAMPLE_PREFIX, SelfTest
from specforge.inference.self_test.features import InlineReader, StoreReader
from specforge.inference.self_test.final_norm import read_final_norms
from specforge.inference.self_test.prompts import LENGTHS, choose_prompts
from specforge.inference.self_test.report import CONVENTIONS
from specforge.inference.self_test.run import self_test
from specforge.inference.target import load_tokenizer
from specforge.testing.faulty_server import FAULTS, FaultyServer
from specforge.testing.local_server import LocalCaptureServer

LAYERS = (1, 4, 6)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "mistral", "gpt2")
FORMATS = ("float32", "bfloat16", "float8_e4m3fn")
NAMED = {
    "nan": "finite",
    "zeros": "zeros",
    "zero_rows": "zeros",
    "constant": "constant",
    "token_ids": "token_ids",
    "previous_request": "previous_request",
    "fixed_prompt": "stale",
    "not_repeatable": "not_repeatable",
    "swapped_items": "other_sample",
    "batch": "batch",
    "row_late": "row_late",
    "row_early": "row_early",
    "bidirectional": "not_causal",
    "same_layer": "same_layer",
    "neighbour_layer": "wrong_layer",
    "layer_order": "layer_order",
    "norm_missing": "norm_missing",
    "norm_twice": "norm_twice",
    "earlier_last": "not_last",
    "other_numerics": "numerics",
}
"""The convention that each fault breaks."""


@pytest.fixture(scope="module")
def demo():
    return HFTargetEngine(PACKAGED_TARGET)


@pytest.fixture(scope="module")
def tables():
    return load_target_tables(PACKAGED_TARGET)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(PACKAGED_TARGET)
    texts = (
        "import os\nfrom pathlib import Path\n\n\ndef main(arguments):\n",
        "class Queue:\n    def __init__(self):\n",
    )
    return [tokenizer(text * 4)["input_ids"] for text in texts]


def make_test(engine, tables, *, dtype="float32", oracle=None, prompts=(), layers=LAYERS, long_tokens=96, **changes):
    spec = CaptureSpec(tuple(layers), last_hidden=True, dtype=dtype)
    return SelfTest(
        engine.info, spec, InlineSink(), tables, InlineReader(), prompts, oracle, long_tokens=long_tokens, **changes
    )


def verdicts(report):
    return {check.name: check.verdict for check in report.checks}


@pytest.mark.parametrize("dtype", FORMATS)
def test_right_server_passes_every_check(demo, tables, prompts, dtype):
    report = self_test(LocalCaptureServer(demo), make_test(demo, tables, dtype=dtype, oracle=demo, prompts=prompts))
    assert report.broken == ()
    assert set(verdicts(report).values()) == {"passed"}
    report.raise_if_failed()


def test_right_server_that_computes_in_bfloat16_passes_beside_an_oracle_in_float32(demo, tables, prompts):
    served = HFTargetEngine(PACKAGED_TARGET, "bfloat16")
    report = self_test(
        LocalCaptureServer(served), make_test(demo, tables, dtype="bfloat16", oracle=demo, prompts=prompts)
    )
    assert report.broken == ()
    assert set(verdicts(report).values()) == {"passed"}
    (layers,) = (check for check in report.checks if check.name == "layer ids")
    assert 0 < max(layers.measured.values()) < 0.02


def test_without_an_oracle_the_report_says_what_is_not_verified(demo, tables):
    report = self_test(LocalCaptureServer(demo), make_test(demo, tables))
    assert report.passed
    assert {name for name, verdict in verdicts(report).items() if verdict != "passed"} == {"layer ids", "last"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_right_server_of_any_architecture_passes(target_dir, name):
    engine = HFTargetEngine(target_dir(name))
    tables = load_target_tables(target_dir(name))
    report = self_test(LocalCaptureServer(engine), make_test(engine, tables, layers=(0, 2), oracle=engine))
    assert report.broken == (), report.sentences
    assert verdicts(report)["final norm"] == "passed"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float8_e4m3fn", marks=pytest.mark.full)])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_by_its_name(demo, tables, prompts, fault, dtype):
    report = self_test(_faulty(demo, fault), make_test(demo, tables, dtype=dtype, oracle=demo, prompts=prompts))
    assert report.broken == (NAMED[fault],), report.sentences
    with pytest.raises(CaptureTestFailed, match=re.escape(CONVENTIONS[NAMED[fault]])) as raised:
        report.raise_if_failed()
    assert "local" in str(raised.value)


@pytest.mark.parametrize("fault", ["row_late", "norm_missing", "earlier_last"])
def test_fault_is_refused_by_its_name_without_an_oracle(demo, tables, prompts, fault):
    report = self_test(_faulty(demo, fault), make_test(demo, tables, prompts=prompts))
    assert report.broken == (NAMED[fault],), report.sentences


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi"])
def test_missing_norm_is_seen_whatever_kind_of_norm_it_is(target_dir, name):
    engine, tables = HFTargetEngine(target_dir(name)), load_target_tables(target_dir(name))
    report = self_test(_faulty(engine, "norm_missing"), make_test(engine, tables, layers=(0, 2)))
    assert report.broken == ("norm_missing",), report.sentences


def test_layer_that_was_given_instead_is_named(demo, tables):
    report = self_test(_faulty(demo, "neighbour_layer"), make_test(demo, tables, oracle=demo))
    (layers,) = (check for check in report.checks if check.broken)
    assert layers.where == "layer 1 holds layer 2, layer 4 holds layer 5, layer 6 holds layer 7"


def test_last_layer_that_equals_last_lacks_the_norm(demo, tables):
    final = demo.info.num_layers - 1
    report = self_test(_faulty(demo, "norm_missing"), make_test(demo, tables, layers=(1, final)))
    assert report.broken == ("norm_missing",)


@pytest.mark.parametrize(("aux", "last"), [((1, 4), False), ((), True)])
def test_what_is_not_captured_is_not_verified(demo, tables, aux, last):
    test = replace(make_test(demo, tables, oracle=demo), spec=CaptureSpec(aux, last))
    report = self_test(LocalCaptureServer(demo), test)
    assert report.passed
    missing = {"layer ids"} if last else {"last", "final norm", "next tokens"}
    assert {name for name, verdict in verdicts(report).items() if verdict == "unverified"} == missing


def test_features_in_a_store_are_tested_there_and_freed(demo, tables, tmp_path):
    store = SharedDirFeatureStore(tmp_path, "run")
    sink = SharedDirSink("run", str(tmp_path))
    seen = []

    class Watching(StoreReader):
        def read(self, request, captured):
            seen.extend(item.sample_id for item in request.items)
            return super().read(request, captured)

    test = replace(make_test(demo, tables, oracle=demo), sink=sink, reader=Watching(store))
    report = self_test(LocalCaptureServer(demo, store), test)
    assert report.passed
    assert store.stored() == []
    assert store.health().num_handles == 0
    assert all(name.startswith(SAMPLE_PREFIX) for name in seen)
    again = self_test(LocalCaptureServer(demo, store), test)
    assert again.passed  # under other sample ids: those of before are gone for good


def test_server_that_captures_no_prompt_is_refused_with_its_reasons(demo, tables):
    class Small(LocalCaptureServer):
        def capture(self, request, timeout_s):
            items = tuple(replace(item, input_ids=(demo.info.vocab_size,)) for item in request.items)
            answer = super().capture(replace(request, items=items), timeout_s)
            asked = zip(request.items, answer.reply.items, strict=True)
            named = tuple(replace(item, num_tokens=len(wanted.input_ids)) for wanted, item in asked)
            return replace(answer, reply=replace(answer.reply, items=named))

    report = self_test(Small(demo), make_test(demo, tables))
    assert report.broken == ("answers",)
    assert "vocabulary" in report.sentences[0]


class Changed(LocalCaptureServer):
    """No bits are promised; ``change`` spoils every feature [S, D] of it."""

    def __init__(self, engine, change, dtype="bfloat16"):
        super().__init__(engine)
        self._change, self._dtype = change, dtype

    def info(self, timeout_s):
        return replace(super().info(timeout_s), strict=False, dtype=self._dtype)

    def capture(self, request, timeout_s):
        answer = super().capture(request, timeout_s)
        tensors = [
            {name: values if name == "input_ids" else self._change(values) for name, values in each.items()}
            for each in answer.tensors
        ]
        return replace(answer, tensors=tuple(tensors))


def noisy(amount):
    """The same for the same features, so that only an oracle sees it."""

    def change(values):
        noise = torch.randn(values.shape[1], generator=torch.Generator().manual_seed(0))
        return values + amount * values.square().mean(dim=1, keepdim=True).sqrt() * noise

    return change


@pytest.mark.parametrize(
    ("amount", "dtype", "verdict"),
    [
        (0.01, "bfloat16", "passed"),
        (0.05, "bfloat16", "warning"),
        (0.2, "bfloat16", "failed"),
        (0.05, "float32", "failed"),
    ],
)
def test_deep_targets_may_be_farther_from_the_oracle_than_a_few_layers_round(demo, tables, amount, dtype, verdict):
    report = self_test(
        Changed(demo, noisy(amount), dtype), make_test(demo, tables, dtype="bfloat16", oracle=demo, layers=(1, 4))
    )
    (check,) = (check for check in report.checks if check.name == "layer ids")
    assert check.verdict == verdict
    assert check.broken == (("numerics",) if verdict == "failed" else ())


@pytest.mark.parametrize(("num_rows", "broken"), [(1, ()), (5, ("not_repeatable",))])
def test_single_row_beyond_rounding_does_not_decide(demo, tables, num_rows, broken):
    calls = []

    def change(values):
        calls.append(len(values))
        spoilt = values.clone()
        if len(values) > 20:
            spoilt[5 : 5 + num_rows] *= 1.0 + 0.2 * (len(calls) % 4 // 2)
        return spoilt

    report = self_test(Changed(demo, change), make_test(demo, tables, dtype="bfloat16"))
    assert report.broken == broken


@pytest.mark.parametrize("fault", ["first rows", "zeros", "tokens"])
def test_long_prompt_that_is_put_together_wrongly_is_seen(demo, tables, fault):
    class Chunked(Changed):
        def capture(self, request, timeout_s):
            answer = super().capture(request, timeout_s)
            for tensors in answer.tensors:
                if len(tensors["input_ids"]) > 90:
                    if fault == "tokens":
                        tensors["input_ids"] = tensors["input_ids"].roll(1)
                    elif fault == "zeros":
                        tensors["aux"][50:60] = 0.0
                    else:
                        tensors["last"] = tensors["last"].roll(8, dims=0)
            return answer

    report = self_test(Chunked(demo, torch.clone), make_test(demo, tables))
    assert report.broken == ("token_ids" if fault == "tokens" else "long_prompt",)


def test_long_prompt_that_is_not_captured_is_not_verified(demo, tables):
    class Short(LocalCaptureServer):
        def capture(self, request, timeout_s):
            answer = super().capture(request, timeout_s)
            items = [
                replace(item, failure=ItemFailure("prompt", "too large"), features=(), num_bytes=0, store="", key="")
                if item.num_tokens > 90
                else item
                for item in answer.reply.items
            ]
            return replace(answer, reply=replace(answer.reply, items=tuple(items)))

    report = self_test(Short(demo), make_test(demo, tables))
    assert report.passed
    (check,) = (check for check in report.checks if check.name == "long prompt")
    assert check.verdict == "unverified"
    assert "too large" in check.where


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), TargetError("not loadable"), MemoryError()])
def test_oracle_that_does_not_run_leaves_the_layers_unverified(demo, tables, error):
    class Broken:
        info = demo.info

        def capture(self, tasks, spec):
            raise error

    report = self_test(LocalCaptureServer(demo), make_test(demo, tables, oracle=Broken()))
    assert report.passed
    unverified = {check.name: check.where for check in report.checks if check.verdict == "unverified"}
    assert unverified.keys() == {"layer ids", "last"}
    assert all(str(error) in where for where in unverified.values())


def test_server_that_generates_nothing_leaves_next_tokens_unverified(demo, tables):
    class Silent(LocalCaptureServer):
        def generate(self, request, timeout_s):
            raise ServerRefused("no generation here")

    report = self_test(Silent(demo), make_test(demo, tables, oracle=demo))
    assert report.passed
    (check,) = (check for check in report.checks if check.verdict == "unverified")
    assert (check.name, "no generation here" in check.where) == ("next tokens", True)


def test_server_of_another_target_or_without_an_answer_is_no_matter_of_features(demo, tables):
    other = replace(demo.info, revision="0" * 64)
    with pytest.raises(ServerRefused, match="another target") as raised:
        self_test(LocalCaptureServer(demo), replace(make_test(demo, tables), target=other))
    assert not isinstance(raised.value, CaptureTestFailed)

    class Gone(LocalCaptureServer):
        def capture(self, request, timeout_s):
            raise ServerUnavailable("gone")

    with pytest.raises(ServerUnavailable, match="gone"):
        self_test(Gone(demo), make_test(demo, tables))


def test_prompts_are_the_runs_own_where_they_are_fit(demo, prompts):
    vocabulary = torch.ones(demo.info.vocab_size, 1)
    unfit = [(), (1,), (7,) * 100, (demo.info.vocab_size,) * 30]
    chosen = choose_prompts([*unfit, *prompts], demo.info, vocabulary, max_tokens=2048)
    longest = sorted(prompts, key=len, reverse=True)
    for row, length, own in zip(chosen.rows, LENGTHS, longest, strict=False):
        assert list(row) == own[-length:]
    assert chosen.num_whole == len(LENGTHS)
    assert chosen == choose_prompts([*unfit, *prompts], demo.info, vocabulary, max_tokens=2048)


@pytest.mark.parametrize("max_tokens", [2, 5, 2048])
def test_prompts_fit_the_server_and_differ(demo, max_tokens):
    chosen = choose_prompts([], demo.info, torch.ones(demo.info.vocab_size, 1), max_tokens)
    assert len(set(chosen.rows)) == len(chosen.rows)
    assert max(map(len, chosen.rows)) <= max_tokens
    assert all(0 <= token < demo.info.vocab_size for row in chosen.rows for token in row)
    assert 1 in map(len, chosen.rows)
    for whole, prefix in chosen.prefixes:
        assert chosen.rows[whole][: len(chosen.rows[prefix])] == chosen.rows[prefix]
    for pair in chosen.replaced:
        original, other = chosen.rows[pair.original], chosen.rows[pair.other]
        assert [i for i, (a, b) in enumerate(zip(original, other, strict=True)) if a != b] == [pair.row]
    assert all(row < len(chosen.rows[prompt]) for prompt, row in chosen.next_rows)


def test_every_fault_has_a_name_and_every_convention_a_row_in_the_manual(repository):
    assert set(NAMED) == set(FAULTS)
    manual = (repository / "docs" / "howto" / "self-test.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", manual, re.MULTILINE)) == set(CONVENTIONS)


def _faulty(engine, fault):
    norm = read_final_norms(Path(engine.info.path), engine.info)[0]
    return FaultyServer(LocalCaptureServer(engine), fault, norm)
