"""Responses in a file: whole batches, as if nothing had interrupted their writing."""

import json
import threading

import pytest

from specforge.contracts.tasks import PromptTask
from specforge.inference.engine import Generation
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.responses import record_responses
from specforge.prompts.config import GenerateOptions
from specforge.prompts.recorded import read_recorded
from specforge.prompts.responses import ResponseOptions

PROMPTS = [PromptTask(f"p{n}", n, tuple(range(n + 1)), (), {"module": "m"}, num_to_generate=3) for n in range(10)]
GREEDY = ResponseOptions(GenerateOptions(max_new_tokens=3), seed=0)
DRAWN = ResponseOptions(GenerateOptions(max_new_tokens=3, temperature=0.8), seed=0)


class CountingEngine:
    """Continues every prompt with its length and the number of prompts in the batch."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls = 0
        self.seeds: list[int] = []
        self._fail_at = fail_at

    def generate(self, prompts, options):
        if self.calls == self._fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.seeds.append(options.seed)
        return [Generation((len(prompt), len(prompts)), False) for prompt in prompts]


def test_an_interrupted_recording_ends_as_the_undisturbed_one(tmp_path):
    list(record_responses(CountingEngine(), PROMPTS, tmp_path / "whole", GREEDY, 4))
    path = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        list(record_responses(CountingEngine(fail_at=1), PROMPTS, path, GREEDY, 4))
    with path.open("ab") as file:  # a batch of which two rows, and a half, reached the disk
        file.write(b'{"input_ids":[1]}\n{"input_ids":[2]}\n{"inpu')
    engine = CountingEngine()
    assert list(record_responses(engine, PROMPTS, path, GREEDY, 4)) == [4, 8, 10]
    assert engine.calls == 2
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_complete_recording_is_not_made_again(tmp_path):
    path = tmp_path / "responses"
    list(record_responses(CountingEngine(), PROMPTS, path, GREEDY, 4))
    again = CountingEngine()
    assert list(record_responses(again, PROMPTS, path, GREEDY, 4)) == [10]
    assert again.calls == 0


def test_only_the_response_is_under_the_loss(tmp_path):
    path = tmp_path / "responses"
    list(record_responses(CountingEngine(), PROMPTS, path, GREEDY, 4))
    for prompt, line in zip(PROMPTS, path.read_text().splitlines(), strict=True):
        row = json.loads(line)
        length = len(prompt.input_ids)
        assert row["input_ids"][:length] == list(prompt.input_ids)
        assert row["loss_spans"] == [[length, length + 2]]
        assert (row["sample_id"], row["attributes"]) == (prompt.sample_id, {"module": "m"})


def test_drawn_responses_are_made_one_by_one_with_a_seed_each(tmp_path):
    engine = CountingEngine()
    list(record_responses(engine, PROMPTS, tmp_path / "responses", DRAWN, 4))
    assert engine.seeds == [DRAWN.of(prompt).seed for prompt in PROMPTS]


def test_samples_with_an_answer_are_written_as_they_are_and_limits_are_each_ones_own(tmp_path):
    tasks = [
        PromptTask("a", 0, (1, 2, 3), ((1, 3),)),
        PromptTask("b", 1, (4, 5), (), num_to_generate=1),
        PromptTask("c", 2, (6,), (), num_to_generate=3),
    ]
    path = tmp_path / "responses"
    list(record_responses(CountingEngine(), tasks, path, GREEDY, 3))
    assert read_recorded(path) == [tasks[0], tasks[1].answered((2,)), tasks[2].answered((1, 2))]


class Meeting:
    """Answers when as many have asked as it waits for."""

    def __init__(self, num_at_once: int) -> None:
        self._all_there = threading.Barrier(num_at_once)

    def generate(self, prompts, options):
        self._all_there.wait(60)
        return [Generation((len(prompt),), False) for prompt in prompts]


def test_several_batches_are_asked_for_at_once_and_written_in_order(tmp_path):
    path = tmp_path / "responses"
    assert list(record_responses(Meeting(5), PROMPTS, path, DRAWN, 1, 5)) == list(range(11))
    assert read_recorded(path) == [prompt.answered((prompt.num_tokens,)) for prompt in PROMPTS]


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_the_size_of_a_batch_does_not_show_in_what_the_target_says(engine: HFTargetEngine, tmp_path, options):
    for size in (1, 4):
        list(record_responses(engine, PROMPTS, tmp_path / str(size), options, size))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "4").read_bytes()
