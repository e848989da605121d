"""The numbers of an evaluation: against one forward over everything, and for every size of micro-batches."""

import math
import threading
import weakref

import pytest
import torch
from held_out_sets import LENGTHS, SAMPLE_BUDGETS, held_out_samples, write_set

from specforge.algorithms.base import Runs, StepContext
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.encoding import decode, encode
from specforge.data_plane.offline import FeatureSet, Manifest
from specforge.data_plane.offline_writer import FeatureSetWriter
from specforge.errors import DataError
from specforge.evaluation.evaluator import Evaluator, EvaluatorSettings, rounds_of
from specforge.evaluation.simulated import simulate
from specforge.prompts.recorded import recorded_lines
from specforge.testing.algorithm_world import SMALL_OPTIONS, World, make_world, small_algorithm
from specforge.testing.drafting import make_drafting
from specforge.testing.samples import pack
from specforge.training.metrics import StepSums

EXHAUSTIVE = StepContext(1, 1, 0, exhaustive=True)
COUNTED = ("avg_acc", "per_position_acc_", "simulated_acc_len", "product_acc_len", "num_")


def evaluator(world, features, tokens=48, ranks=None, dtype=torch.float32):
    return Evaluator(world.algorithm, world.tables, features, EvaluatorSettings(tokens, "cpu", dtype), ranks)


@pytest.fixture
def world():
    return make_world(small_algorithm("eagle3"))


@pytest.mark.parametrize("case", SMALL_OPTIONS)
def test_the_numbers_are_those_of_one_forward_at_every_size_of_micro_batches(tmp_path, case):
    world = make_world(small_algorithm(case))
    samples = held_out_samples(world)
    features = write_set(tmp_path, world, samples)
    with torch.no_grad():
        output = world.loss(pack(samples), EXHAUSTIVE)
    weight = world.weight([pack(samples)], EXHAUSTIVE)
    found, num_batches = {}, {}
    for num_samples, tokens in SAMPLE_BUDGETS.items():
        measuring = evaluator(world, features, tokens)
        found[num_samples], num_batches[num_samples] = measuring.run(world.draft), measuring.num_micro_batches
    assert num_batches[1] == len(LENGTHS) > num_batches[4] > num_batches[16] > 1
    for scalars in found.values():
        assert scalars.keys() == found[1].keys()
        assert scalars["eval/avg_loss"] == pytest.approx(float(output.loss_sum) / weight, rel=1e-6)
        assert scalars["eval/avg_acc"] == int(output.correct.sum()) / int(output.count.sum())
        for index, (correct, count) in enumerate(zip(output.correct.tolist(), output.count.tolist(), strict=True)):
            assert scalars[f"eval/per_position_acc_{index}"] == correct / count
        assert scalars["eval/simulated_acc_len_all_rows"] == 1 + int(output.runs.lengths.sum()) / len(
            output.runs.lengths
        )
        assert scalars["eval/num_supervised"] == len(output.runs.lengths) > 0
        assert scalars["eval/num_samples"] == len(samples)
        assert 0 < scalars["eval/num_rounds"] <= scalars["eval/num_supervised"]
        for name, value in found[1].items():
            if name.removeprefix("eval/").startswith(COUNTED):
                assert scalars[name] == value, name
            else:
                assert scalars[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for name, (value, count) in output.metrics.items():
            assert scalars[f"eval/{name}"] == pytest.approx(float(value) / max(float(count), 1e-12), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("case", ["eagle3", "dflash", "mtp", "medusa"])
def test_simulated_rounds_are_those_of_decoding_the_whole_answer(tmp_path, make_target, case):
    target = make_target(8)
    drafting = make_drafting(target, case)
    prompts = ([3, 1], [5, 1, 1, 0, 2, 7, 4], [6, 2, 3, 3])
    texts = [(prompt, target.generate([prompt], Generate(40))[0].token_ids) for prompt in prompts]
    expected = simulate(
        target, drafting.algorithm, drafting.draft, target.tables, drafting.spec, texts, max_new_tokens=10**6
    )
    assert expected.num_rounds > 0
    features = captured(tmp_path, target, drafting.spec, texts)
    measuring = Evaluator(drafting.algorithm, target.tables, features, EvaluatorSettings(60))
    found = measuring.run(drafting.draft)
    assert found["eval/simulated_acc_len"] == expected.simulated_acc_len
    assert found["eval/num_rounds"] == expected.num_rounds
    assert found["eval/avg_loss"] == pytest.approx(expected.scalars["loss"], rel=1e-6)


def captured(directory, target, spec: CaptureSpec, texts):
    """The real target's features of ``texts``, with the answers under the loss."""
    tasks = [
        PromptTask(f"text-{i}", i, (*prompt, *answer), ((len(prompt), len(prompt) + len(answer)),))
        for i, (prompt, answer) in enumerate(texts)
    ]
    manifest = Manifest(
        target.info.revision, "", "float32", spec, spec.fingerprint, target.info.hidden_size, "", len(tasks)
    )
    writer = FeatureSetWriter(directory, manifest, recorded_lines(tasks), [task.sample_id for task in tasks])
    for task, sample in zip(tasks, target.capture(tasks, spec), strict=True):
        writer.add(task.sample_id, task.num_tokens, task.loss_spans, sample.tensors)
    writer.finish()
    writer.close()
    return FeatureSet(directory)


def item(num_tokens, *spans):
    return SlotRef(Slot(0, 0), SampleRef("a", 1, num_tokens, spans, "", "", 0, (), "", "", ""))


def test_rounds_skip_what_they_accept_and_start_anew_in_every_answer():
    items = [item(10, (2, 10)), item(8, (1, 4), (5, 8))]
    # answers: tokens 2..9; 11..13 and 15..17 of the pack
    runs = Runs(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16]), torch.tensor([0, 2, 5, 5, 1, 5, 0, 4, 9, 0, 3]))
    # 2 -> 5 (run 2) -> 7 (run 1) -> 8 (run 0) -> 9, the last token of the answer, though 4 more were right;
    # 11 -> 13 (the answer ends); 15 was not asked, 16 -> 17
    assert rounds_of(runs, items) == (6.0, 3 + 2 + 1 + 1 + 2 + 1)
    assert rounds_of(Runs(torch.zeros(0).long(), torch.zeros(0).long()), items) == (0.0, 0.0)


def test_the_draft_is_evaluated_in_evaluation_mode_and_left_as_it_was(tmp_path, world):
    features = write_set(tmp_path, world, held_out_samples(world))
    modes = []
    forward = world.algorithm.forward_loss

    def watched(draft, *arguments):
        modes.append(draft.training or torch.is_grad_enabled())
        return forward(draft, *arguments)

    world.algorithm.forward_loss = watched
    world.draft.train()
    first = next(iter(world.draft.children()))
    first.eval()
    before = {name: tensor.clone() for name, tensor in world.draft.state_dict().items()}
    random = torch.get_rng_state()
    evaluator(world, features).run(world.draft)
    assert modes
    assert not any(modes)
    assert world.draft.training
    assert not first.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in world.draft.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.draft.state_dict().items())
    world.algorithm.forward_loss = None
    with pytest.raises(TypeError):
        evaluator(world, features).run(world.draft)
    assert world.draft.training
    assert not first.training


def test_repeated_evaluations_are_equal_to_the_last_bit_and_a_changed_draft_is_another(tmp_path, world):
    measuring = evaluator(world, write_set(tmp_path, world, held_out_samples(world)))
    first = measuring.run(world.draft)
    assert measuring.run(world.draft) == first
    other = measuring.run(make_world(small_algorithm("eagle3"), seed=12).draft)
    assert other["eval/avg_loss"] != first["eval/avg_loss"]


def test_the_forward_runs_in_the_number_format_of_the_training(tmp_path, world):
    features = write_set(tmp_path, world, held_out_samples(world))
    exact = evaluator(world, features).run(world.draft)["eval/avg_loss"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batch = pack(held_out_samples(world))
        expected = float(world.loss(batch, EXHAUSTIVE).loss_sum) / world.weight([batch], EXHAUSTIVE)
    rounded = evaluator(world, features, dtype=torch.bfloat16).run(world.draft)["eval/avg_loss"]
    assert rounded != exact
    assert abs(rounded - expected) < abs(exact - expected)
    assert rounded == pytest.approx(exact, rel=0.05)


def test_one_micro_batch_is_in_memory_at_a_time(tmp_path, world):
    features = write_set(tmp_path, world, held_out_samples(world))
    alive, forward = [], world.algorithm.forward_loss

    def watched(draft, tables, batch, context):
        assert [it() for it in alive] == [None] * len(alive)
        alive.append(weakref.ref(batch.features["last"]))
        return forward(draft, tables, batch, context)

    world.algorithm.forward_loss = watched
    evaluator(world, features, SAMPLE_BUDGETS[4]).run(world.draft)
    assert len(alive) > 3


def test_float8_features_are_evaluated_decoded(tmp_path):
    world = make_world(small_algorithm("eagle3"))
    samples = held_out_samples(world)
    hidden = world.target.hidden_size
    stored, decoded = [], []
    for sample in samples:
        coded, plain = {}, {}
        for name, tensor in sample.features.items():
            values, scales = encode(list(tensor.split(hidden, dim=1)))
            coded |= {name: values, f"{name}_scale": scales}
            decode(values, scales, rounded := torch.empty(tensor.shape, dtype=torch.bfloat16))
            plain[name] = rounded.float()
        stored.append(type(sample)(sample.name, sample.ids, sample.mask, coded, sample.slot))
        decoded.append(type(sample)(sample.name, sample.ids, sample.mask, plain, sample.slot))
    found = evaluator(world, write_set(tmp_path / "coded", world, stored)).run(world.draft)
    expected = evaluator(world, write_set(tmp_path / "plain", world, decoded)).run(world.draft)
    assert found["eval/avg_acc"] == expected["eval/avg_acc"]
    assert found["eval/avg_loss"] == pytest.approx(expected["eval/avg_loss"], rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_by_name(tmp_path, world, value):
    samples = held_out_samples(world)
    samples[6].features["last"][2, 3] = value
    measuring = evaluator(world, write_set(tmp_path, world, samples))
    with pytest.raises(DataError, match=r"evaluation sample 'sample-6' has NaN or infinite values in feature 'last'"):
        measuring.run(world.draft)


def test_a_file_that_is_gone_or_damaged_is_named(tmp_path, world):
    features = write_set(tmp_path, world, held_out_samples(world))
    path = tmp_path / features.entries["sample-3"].path
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    measuring = evaluator(world, features)
    with pytest.raises(DataError, match=r"sample-3\.safetensors.* it is captured again"):
        measuring.run(world.draft)
    path.unlink()
    with pytest.raises(DataError, match=r"sample-3\.safetensors cannot be read"):
        measuring.run(world.draft)
    path.write_bytes(content)
    assert math.isfinite(measuring.run(world.draft)["eval/avg_loss"])


@pytest.mark.parametrize("case", ["eagle3", "dflash", "peagle", "dspark", "medusa"])
def test_samples_without_a_token_to_evaluate_are_refused_at_once(tmp_path, case):
    world = make_world(small_algorithm(case))
    masked = [sample.masked() for sample in held_out_samples(world)]
    with pytest.raises(DataError, match=rf"none of the 24 evaluation samples has a token that {case} is measured at"):
        evaluator(world, write_set(tmp_path, world, masked))


def test_samples_that_failed_are_left_out_and_reported(tmp_path, world, caplog):
    samples = held_out_samples(world)
    features = write_set(tmp_path / "some", world, samples, failed={"sample-0", "sample-5"})
    found = evaluator(world, features).run(world.draft)
    assert "2 of 24 evaluation samples could not be captured" in caplog.text
    kept = [sample for sample in samples if sample.name not in {"sample-0", "sample-5"}]
    assert found == evaluator(world, write_set(tmp_path / "kept", world, kept)).run(world.draft)
    with pytest.raises(DataError, match="no evaluation sample could be captured"):
        evaluator(world, write_set(tmp_path / "none", world, samples[:1], failed={"sample-0"}))


class ThreadRanks:
    """Ranks of this process, a thread each: ``gather`` waits for all of them, as a collective does."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def gather(self, values):
        self._board[self.rank] = list(values)
        self._barrier.wait(timeout=60)
        found = [list(row) for row in self._board]
        self._barrier.wait(timeout=60)
        return found


def on_ranks(world: World, features, size, tokens):
    """What every rank found, or raised, and how many forwards each ran."""
    board, barrier = [None] * size, threading.Barrier(size)
    found, forwards = [None] * size, [0] * size

    def run(rank):
        own = make_world(world.algorithm)
        measuring = evaluator(own, features, tokens, ThreadRanks(rank, size, board, barrier))
        forward = measuring._forward

        def counted(draft, batch):
            forwards[rank] += 1
            return forward(draft, batch)

        measuring._forward = counted
        try:
            found[rank] = measuring.run(own.draft)
        except DataError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return found, forwards


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_run_as_many_forwards_each_and_agree_to_the_last_bit(tmp_path, world, size):
    features = write_set(tmp_path, world, held_out_samples(world))
    expected = evaluator(world, features).run(world.draft)
    found, forwards = on_ranks(world, features, size, 48)
    assert found == [expected] * size
    assert len(set(forwards)) == 1


def test_there_may_be_more_ranks_than_samples(tmp_path, world):
    features = write_set(tmp_path, world, held_out_samples(world, (9, 12)))
    expected = evaluator(world, features, 12).run(world.draft)
    found, forwards = on_ranks(world, features, 4, 12)
    assert found == [expected] * 4
    assert forwards == [1] * 4


def test_a_sample_that_one_rank_cannot_use_ends_the_evaluation_on_all(tmp_path, world):
    samples = held_out_samples(world)
    samples[6].features["last"][2, 3] = float("nan")
    found, forwards = on_ranks(world, write_set(tmp_path, world, samples), 3, 12)
    assert all(isinstance(error, DataError) and "'sample-6'" in str(error) for error in found)
    assert sum("NaN or infinite values" in str(error) for error in found) == 1
    assert sum("see the error of rank" in str(error) for error in found) == 2
    assert len(set(forwards)) == 1


def test_sums_travel_between_ranks_as_one_row_of_numbers(world):
    sums = StepSums()
    with torch.no_grad():
        sums.add(world.loss(pack(held_out_samples(world)), EXHAUSTIVE))
    assert sums.with_values(sums.values()) == sums
    assert sums.metrics
    empty = StepSums()
    with torch.no_grad():
        empty.add(world.loss(world.empty, EXHAUSTIVE))
    assert empty.with_values(sums.values()) == sums
    with pytest.raises(Exception, match="every rank must run the same algorithm"):
        sums.with_values(sums.values()[1:])
