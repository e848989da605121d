"""Prompts that the target is to answer, of every kind of row."""

import json
from dataclasses import replace

import pytest

from specforge.contracts.capture_server import Generate
from specforge.errors import ConfigError, DataError
from specforge.prompts.config import DataConfig, GenerateOptions
from specforge.prompts.recorded import read_recorded, recorded_lines
from specforge.prompts.responses import ResponseOptions
from specforge.prompts.tasks import make_task, read_prompts

USER = {"role": "user", "content": "hello"}
ANSWERED = {"messages": [USER, {"role": "assistant", "content": "yes"}]}
OPEN = {"messages": [USER]}


@pytest.fixture
def data(tmp_path, templates):
    """A DataConfig over the given rows, whose prompts are answered with 10 tokens at most."""

    def config(*rows, max_new_tokens=10, keep_original=False, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = tmp_path / "chat.jinja"
        template.write_text(templates["chatml"])
        generate = GenerateOptions(max_new_tokens=max_new_tokens, keep_original=keep_original)
        return DataConfig(path=path, chat_template=template, generate=generate, **options)

    return config


def test_the_last_answer_is_dropped_and_the_prompt_ends_where_the_assistant_writes(data, tokenizer):
    answered, unanswered = read_prompts(data(ANSWERED, OPEN), tokenizer).tasks
    assert tokenizer.decode(answered.input_ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert answered.input_ids == unanswered.input_ids
    assert (answered.loss_spans, answered.num_to_generate) == ((), 10)
    assert answered.sample_id != unanswered.sample_id


def test_only_the_last_answer_is_dropped(data, tokenizer):
    turns = [*ANSWERED["messages"], {"role": "user", "content": "again"}, {"role": "assistant", "content": "no"}]
    (task,) = read_prompts(data({"messages": turns}), tokenizer).tasks
    text = tokenizer.decode(task.input_ids)
    assert "yes" in text
    assert text.endswith("again<|im_end|>\n<|im_start|>assistant\n")


def test_a_plain_text_is_a_prompt(data, tokenizer):
    (task,) = read_prompts(data({"text": "hello there"}), tokenizer).tasks
    assert tokenizer.decode(task.input_ids) == "hello there"
    assert (task.loss_spans, task.num_to_generate) == ((), 10)


@pytest.mark.parametrize(("spans", "num_tokens"), [([], 6), ([[4, 6]], 4), ([[1, 2], [3, 6]], 3), ([[0, 6]], 6)])
def test_recorded_tokens_are_a_prompt_up_to_their_last_answer(data, tokenizer, spans, num_tokens):
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "loss_spans": spans, "attributes": {"a": "b"}}
    (task,) = read_prompts(data(row), tokenizer).tasks
    assert task.input_ids == tuple(range(5, 5 + num_tokens))
    assert (task.loss_spans, task.num_to_generate, task.attributes) == ((), 10, {"a": "b"})


def test_original_answers_are_kept_where_that_is_asked_for(data, tokenizer):
    rows = [ANSWERED, OPEN, {"text": "hello"}, {"input_ids": [5, 6, 7], "loss_spans": [[1, 3]]}]
    tasks = read_prompts(data(*rows, keep_original=True), tokenizer).tasks
    assert [task.num_to_generate for task in tasks] == [0, 10, 10, 0]
    assert tokenizer.decode(tasks[0].input_ids[slice(*tasks[0].loss_spans[0])]) == "yes<|im_end|>"
    assert tasks[3].loss_spans == ((1, 3),)


def test_the_longest_length_bounds_prompt_and_response_and_cuts_no_prompt(data, tokenizer):
    rows = [{"input_ids": list(range(n)), "loss_spans": []} for n in (2, 5, 7, 8, 9)]
    prompts = read_prompts(data(*rows, max_length=8), tokenizer)
    assert [(task.num_tokens, task.num_to_generate) for task in prompts.tasks] == [(2, 6), (5, 3), (7, 1)]
    assert [task.max_tokens for task in prompts.tasks] == [8, 8, 8]
    assert (prompts.num_without_loss, prompts.num_truncated) == (2, 0)
    shorter = read_prompts(data(*rows, max_length=8, min_loss_tokens=3), tokenizer)
    assert [task.num_tokens for task in shorter.tasks] == [2, 5]


def test_a_conversation_without_a_question_is_refused(data, tokenizer):
    with pytest.raises(DataError, match=r"line 1: the conversation has no message before the assistant's"):
        read_prompts(data({"messages": ANSWERED["messages"][1:]}), tokenizer)


def test_responses_too_short_to_be_trained_are_refused(data):
    with pytest.raises(ConfigError, match=r"max_new_tokens is 3, less than data\.min_loss_tokens = 4"):
        data(OPEN, max_new_tokens=3, min_loss_tokens=4)


def test_the_options_of_a_response_depend_on_the_run_and_the_number_of_the_prompt_alone():
    options = GenerateOptions(max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=5)
    of_run = ResponseOptions.of_run(options, 3)
    task = make_task(7, (1, 2), ())
    found = of_run.of(task)
    assert found == Generate(max_new_tokens=0, temperature=0.8, top_p=0.9, top_k=5, seed=found.seed)
    assert found == of_run.of(make_task(7, (5, 6, 7), ()))
    others = {
        ResponseOptions.of_run(options, seed).of(make_task(index, (1,), ())).seed for seed in (3, 4) for index in (7, 8)
    }
    assert len(others) == 4
    assert all(0 <= seed < 2**63 for seed in others)
    given = options.model_copy(update={"seed": 4})
    assert ResponseOptions.of_run(given, 3) == ResponseOptions(given, 4)
    assert ResponseOptions.of_run(None, 3) is None


def test_what_changes_responses_is_in_their_identity():
    def identity(seed=0, **changes):
        return ResponseOptions.of_run(GenerateOptions(**changes), seed).identity()

    assert identity(seed=1) == identity(seed=2), "greedy responses have no seed"
    drawn = identity(seed=1, temperature=0.5)
    assert drawn != identity(seed=2, temperature=0.5)
    assert drawn == identity(seed=2, temperature=0.5) | {"seed": 1}
    changed = [{"max_new_tokens": 3}, {"temperature": 0.6}, {"top_p": 0.5}, {"top_k": 3}, {"keep_original": True}]
    assert all(identity(seed=1, **{"temperature": 0.5, **change}) != drawn for change in changed)


def test_a_regenerated_row_keeps_the_name_of_its_prompt(tmp_path, tokenizer):
    prompt = make_task(4, (5, 6), ())
    path = tmp_path / "rows.jsonl"
    path.write_bytes(recorded_lines([prompt.answered((7, 8)), make_task(1, (5, 6), ((0, 2),))]))
    first, second = read_recorded(path)
    assert (first.sample_id, first.input_ids, first.loss_spans) == (prompt.sample_id, (5, 6, 7, 8), ((2, 4),))
    assert second.sample_id == make_task(1, (5, 6), ()).sample_id
    assert [task.sample_id for task in read_prompts(DataConfig(path=path), tokenizer).tasks] == [
        first.sample_id,
        second.sample_id,
    ]
    path.write_bytes(2 * recorded_lines([prompt.answered((7,))]))
    for read in (read_recorded, lambda file: read_prompts(DataConfig(path=file), tokenizer)):
        with pytest.raises(DataError, match="given to two rows"):
            read(path)


def test_short_responses_are_read_as_the_run_that_made_them_trained_them(tmp_path, tokenizer):
    """A run trains every response, of whatever length: so does a run that reads the file."""
    prompts = [make_task(number, (5, number + 6), ()) for number in range(4)]
    answers = ((9,), (), tuple(range(9, 15)), (8, 9))
    tasks = [replace(prompt, num_to_generate=8).answered(ids) for prompt, ids in zip(prompts, answers, strict=True)]
    path = tmp_path / "responses.jsonl"
    path.write_bytes(recorded_lines(tasks, keep_ids=True))
    assert read_prompts(DataConfig(path=path, min_loss_tokens=4), tokenizer).tasks == tasks
    path.write_bytes(recorded_lines([replace(task, sample_id="") for task in tasks]))
    (long,) = read_prompts(DataConfig(path=path, min_loss_tokens=4), tokenizer).tasks
    assert long.input_ids == tasks[2].input_ids
