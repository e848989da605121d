from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.demo.run import print_report
from specforge.errors import DataError
from specforge.evaluation import speculative as module
from specforge.evaluation.report import DecodedPrompt, distinct_ngrams, summarise
from specforge.evaluation.speculative import SpeculativeDecoder, first_mismatch
from specforge.evaluation.verification import Verdict, verify_greedy
from specforge.inference.engine import TargetSession
from specforge.inference.huggingface import HFTargetEngine
from specforge.monitor.report import render_report

SPEC = CaptureSpec((0, 2), True)
NUM_NEW = 24


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("target")
    torch.manual_seed(7)
    config = transformers.Qwen3Config(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def engine(target: Path) -> HFTargetEngine:
    """Without stop tokens, so that lengths are known."""
    engine = HFTargetEngine(target)
    engine.info = replace(engine.info, eos_token_ids=())
    return engine


def prompts(count: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 9, 5, 13, 3][:count]
    return [torch.randint(1, 48, (length,), generator=generator).tolist() for length in lengths]


class OracleProposer(Proposer):
    """Proposes what the target itself would say."""

    def __init__(self, engine: HFTargetEngine) -> None:
        self._engine = engine

    def reset(self) -> None:
        pass

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        return Proposal(self._engine.generate([tokens], Generate(request.num_proposals))[0].token_ids)


class PartlyRightProposer(OracleProposer):
    """Right for the first ``num_right`` proposals of every round, wrong at the next."""

    def __init__(self, engine: HFTargetEngine, num_right: int) -> None:
        super().__init__(engine)
        self._num_right = num_right

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        right = list(super().propose(tokens, features, request).tokens)
        if len(right) > self._num_right:
            right[self._num_right] = (right[self._num_right] + 1) % 48
        return Proposal(tuple(right))


class RandomProposer(Proposer):
    """Random tokens, in random number; checks that features arrive once for every processed position."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.rows: list[Tensor] = []

    def reset(self) -> None:
        self.rows = []

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        self.rows.append(features["aux"])
        assert sum(len(rows) for rows in self.rows) == len(tokens) - 1
        count = int(torch.randint(0, request.num_proposals + 1, (1,), generator=self._generator))
        return Proposal(tuple(torch.randint(0, 48, (count,), generator=self._generator).tolist()))


@pytest.mark.parametrize("num_proposals", [1, 2, 5])
def test_oracle_draft_is_always_accepted(engine: HFTargetEngine, num_proposals: int):
    """Oracle 48. Accepted length = l + 1."""
    decoder = SpeculativeDecoder(engine, OracleProposer(engine), SPEC, num_proposals)
    report = decoder.evaluate(prompts(), NUM_NEW)
    assert report.accepted_length_mean == num_proposals + 1
    assert report.acceptance_per_position == (1.0,) * num_proposals
    assert report.lossless
    assert (report.num_prompts_compared, report.num_tokens_compared) == (4, 4 * NUM_NEW)
    # after the token of the prefill, full rounds fit NUM_NEW - 1 tokens so often
    assert report.num_rounds == 4 * ((NUM_NEW - 1) // (num_proposals + 1))


@pytest.mark.parametrize("num_proposals", [1, 4])
def test_random_draft_gives_the_exact_output(engine: HFTargetEngine, num_proposals: int):
    """Oracle 49. Random tokens, in random number."""
    report = SpeculativeDecoder(engine, RandomProposer(), SPEC, num_proposals).evaluate(prompts(6), NUM_NEW)
    assert report.lossless
    assert report.num_mismatches == report.num_near_ties == 0
    assert all(
        row.plain_tokens == row.speculative_tokens and len(row.plain_tokens) == NUM_NEW for row in report.prompts
    )
    assert 1.0 <= report.accepted_length_mean < 1.5


def test_plain_output_is_that_of_the_engine(engine: HFTargetEngine):
    decoder = SpeculativeDecoder(engine, RandomProposer(), SPEC, 3)
    for prompt in prompts(6):
        assert decoder.plain(prompt, NUM_NEW).tokens == engine.generate([prompt], Generate(NUM_NEW))[0].token_ids


@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_acceptance_is_counted_per_position(engine: HFTargetEngine, num_right: int):
    decoder = SpeculativeDecoder(engine, PartlyRightProposer(engine, num_right), SPEC, 4)
    report = decoder.evaluate(prompts(), NUM_NEW)
    assert report.accepted_length_mean == num_right + 1
    assert report.acceptance_per_position == tuple(float(i < num_right) for i in range(4))
    assert report.lossless


def test_features_of_accepted_positions_equal_a_capture(engine: HFTargetEngine):
    proposer = RandomProposer()
    (prompt,) = prompts(1)
    decoded = SpeculativeDecoder(engine, proposer, SPEC, 3).speculative(prompt, 9)
    session = engine.session(SPEC)
    _, expected = session.forward([*prompt, *decoded.tokens])
    seen = torch.cat(proposer.rows)
    torch.testing.assert_close(seen, expected["aux"][: len(seen)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", [0, 1, 4, 7, 20])
def test_stop_token_ends_both_outputs_at_the_same_place(engine: HFTargetEngine, position: int):
    """Oracle 50. Stops in the prefill, inside an accepted run and as the extra token."""
    (prompt,) = prompts(3)[2:]
    free = engine.generate([prompt], Generate(NUM_NEW))[0].token_ids
    first = free.index(free[position])
    engine.info = replace(engine.info, eos_token_ids=(free[position],))
    decoder = SpeculativeDecoder(engine, OracleProposer(engine), SPEC, 5)
    report = decoder.evaluate([prompt], NUM_NEW)
    assert report.prompts[0].speculative_tokens == free[: first + 1]
    assert report.lossless


@pytest.mark.parametrize("position", [1, 2, 4, 7, 13, 20])
def test_round_that_a_stop_token_cuts_counts_with_the_tokens_it_committed(engine: HFTargetEngine, position: int):
    (prompt,) = prompts(3)[2:]
    free = engine.generate([prompt], Generate(NUM_NEW))[0].token_ids
    last = free.index(free[position])
    engine.info = replace(engine.info, eos_token_ids=(free[position],))
    decoded = SpeculativeDecoder(engine, OracleProposer(engine), SPEC, 5).speculative(prompt, NUM_NEW + 6)
    full, rest = divmod(last, 6)
    assert decoded.accepted == (5,) * full + ((rest - 1,) if rest else ())
    assert all(a_round.counts for a_round in decoded.rounds)
    assert sum(len(a_round.committed) for a_round in decoded.rounds) == last


@pytest.mark.parametrize("num_new", [1, 2, 3, 6, 7, 8])
def test_length_limit_cuts_the_last_round_and_leaves_it_out(engine: HFTargetEngine, num_new: int):
    report = SpeculativeDecoder(engine, OracleProposer(engine), SPEC, 5).evaluate(prompts(), num_new)
    assert all(len(row.speculative_tokens) == num_new for row in report.prompts)
    assert report.lossless
    assert report.num_rounds == (4 if num_new >= 7 else 0)
    assert report.accepted_length_mean == (6.0 if num_new >= 7 else None)
    assert report.acceptance_per_position == ((1.0,) * 5 if num_new >= 7 else ())


def test_verifier_that_accepts_too_much_is_found_out(engine: HFTargetEngine, monkeypatch: pytest.MonkeyPatch):
    def one_too_many(proposal: Proposal, choices: Sequence[int]) -> Verdict:
        count = min(len(verify_greedy(proposal, choices).accepted) + 1, len(proposal.tokens))
        return Verdict(tuple(range(count)), choices[count])

    monkeypatch.setattr(module, "verify_greedy", one_too_many)
    report = SpeculativeDecoder(engine, PartlyRightProposer(engine, 1), SPEC, 3).evaluate(prompts(), NUM_NEW)
    assert report.lossless is False
    assert report.num_mismatches == 4
    assert report.num_near_ties == 0


class ForgetfulEngine:
    """The real engine, except that its sessions never drop rejected positions."""

    def __init__(self, engine: HFTargetEngine) -> None:
        self.info, self.dtype, self._engine = engine.info, engine.dtype, engine
        self.reference_logits = engine.reference_logits

    def session(self, spec: CaptureSpec) -> TargetSession:
        session = self._engine.session(spec)
        session.crop = lambda num_tokens: None  # type: ignore[method-assign]
        return session


def test_cache_that_keeps_rejected_tokens_is_found_out(engine: HFTargetEngine):
    decoder = SpeculativeDecoder(ForgetfulEngine(engine), PartlyRightProposer(engine, 1), SPEC, 3)
    assert decoder.evaluate(prompts(), NUM_NEW).lossless is False


class TiedSession:
    """A session whose logits are moved by ``noise`` for one-token forwards only, as another kernel would."""

    def __init__(self, session: TargetSession, noise: float) -> None:
        self._session, self._noise = session, noise
        self.crop = session.crop

    def forward(self, token_ids: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, features = self._session.forward(token_ids)
        if len(token_ids) == 1:
            top = logits.topk(2).indices
            logits = logits.scatter_add(1, top[:, 1:], torch.full((1, 1), self._noise))
        return logits, features


class TiedEngine:
    """An engine with two equal rows in its head, or nearly so: every greedy choice among them is a near-tie."""

    def __init__(self, engine: HFTargetEngine, noise: float, gap: float) -> None:
        self.info, self.dtype, self._engine = engine.info, engine.dtype, engine
        self._noise, self._gap = noise, gap
        self.num_references = 0

    def session(self, spec: CaptureSpec) -> TargetSession:
        return TiedSession(self._engine.session(spec), self._noise)

    def reference_logits(self, token_ids: Sequence[int]) -> Tensor:
        """The runner-up brought to within ``gap`` of the best."""
        self.num_references += 1
        logits = self._engine.reference_logits(token_ids)
        best, second = logits.topk(2).indices
        logits[second] = logits[best] - self._gap
        return logits


def test_near_tie_in_float64_is_excused_and_ends_the_comparison(engine: HFTargetEngine):
    tied = TiedEngine(engine, noise=1e3, gap=1e-6)
    report = SpeculativeDecoder(tied, OracleProposer(engine), SPEC, 3).evaluate(prompts(2), 8)
    assert report.lossless
    assert report.num_near_ties == 2
    assert report.num_tokens_compared == sum(row.mismatch for row in report.prompts) < 16


def test_mismatch_with_a_gap_in_float64_is_not_excused(engine: HFTargetEngine):
    tied = TiedEngine(engine, noise=1e3, gap=2e-5)
    report = SpeculativeDecoder(tied, OracleProposer(engine), SPEC, 3).evaluate(prompts(2), 8)
    assert report.lossless is False
    assert (report.num_mismatches, report.num_near_ties) == (2, 0)


def test_float64_is_asked_only_after_a_mismatch(engine: HFTargetEngine):
    tied = TiedEngine(engine, noise=0.0, gap=1e-6)
    assert SpeculativeDecoder(tied, OracleProposer(engine), SPEC, 3).evaluate(prompts(2), 8).lossless
    assert tied.num_references == 0


def test_short_formats_are_reported_but_not_judged(target: Path):
    engine = HFTargetEngine(target, dtype="bfloat16")
    report = SpeculativeDecoder(engine, RandomProposer(), SPEC, 3).evaluate(prompts(2), 6)
    assert report.lossless is None
    assert report.num_prompts_compared == 2


def test_nothing_to_decode_is_said_in_one_sentence(engine: HFTargetEngine):
    decoder = SpeculativeDecoder(engine, RandomProposer(), SPEC, 3)
    with pytest.raises(DataError, match="at least one prompt"):
        decoder.evaluate([], 5)


def test_progress_is_told_after_every_prompt(engine: HFTargetEngine):
    seen: list[int] = []
    SpeculativeDecoder(engine, RandomProposer(), SPEC, 3).evaluate(prompts(3), 2, seen.append)
    assert seen == [1, 2, 3]


def test_ties_go_to_the_lowest_id():
    assert torch.tensor([[1.0, 3.0, 3.0, 3.0]] * 2).argmax(-1).tolist() == [1, 1]
    wide = torch.zeros(1, 50_000)
    wide[0, [777, 40_000]] = 1.0
    assert int(wide.argmax(-1)) == 777


def test_report_without_a_round_is_shown_without_an_accepted_length(capsys: pytest.CaptureFixture[str]):
    row = DecodedPrompt(3, 0, (1, 2), (1, 2), 1.0, 1.0, (), None, False)
    report = summarise([row], 4, judged=True).to_dict()
    del report["prompts"]
    assert (report["accepted_length_mean"], report["acceptance_per_position"]) == (None, ())
    assert "no verification round counted" in render_report(report | {"accepted_length_untrained": None}, [], "title")
    others = dict.fromkeys(["speed_up", "num_samples_trained", "num_samples_unique", "num_steps"], 1)
    texts = dict.fromkeys(["algorithm", "topology", "draft_weights_sha256"], "a")
    shown = {"accepted_length_untrained": 1.25, "export": {"path": "p", "format": "f"}, "wall_seconds": {}}
    print_report(report | others | texts | shown, Path("out"))
    assert "- tokens a round (untrained draft: 1.25)" in capsys.readouterr().err


def test_rates_are_sums_before_ratios():
    def row(num_tokens: int, seconds: float, accepted: tuple[int, ...]) -> DecodedPrompt:
        tokens = tuple(range(num_tokens))
        return DecodedPrompt(3, 0, tokens, tokens, seconds, seconds / 2, accepted, None, False)

    report = summarise([row(11, 1.0, (0, 2)), row(31, 3.0, (2,))], 2, judged=True)
    assert report.tokens_per_second_plain == 10.0
    assert report.speed_up == 2.0
    assert report.accepted_length_mean == pytest.approx(1 + 4 / 3)
    assert report.acceptance_per_position == (2 / 3, 2 / 3)


def test_report_is_plain_data(engine: HFTargetEngine):
    def leaves(value: object) -> Iterator[object]:
        if isinstance(value, dict):
            for item in value.values():
                yield from leaves(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from leaves(item)
        else:
            yield value

    report = SpeculativeDecoder(engine, RandomProposer(), SPEC, 2).evaluate(prompts(1), 3)
    assert all(leaf is None or isinstance(leaf, int | float | bool) for leaf in leaves(report.to_dict()))


def test_first_mismatch_counts_a_missing_tail():
    assert first_mismatch([1, 2, 3], [1, 2, 3]) is None
    assert first_mismatch([1, 2, 3], [1, 5, 3]) == 1
    assert first_mismatch([1, 2, 3], [1, 2]) == 2


def test_loops_have_few_distinct_ngrams():
    assert distinct_ngrams([[1, 2, 3, 4, 5, 6]], 4) == 1.0
    assert distinct_ngrams([[1, 1, 1, 1, 1, 1]], 4) == pytest.approx(1 / 3)
    assert distinct_ngrams([[1, 2]], 4) == 0.0
