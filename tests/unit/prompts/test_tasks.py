import json

import pytest

from specforge.errors import DataError
from specforge.prompts.config import DataConfig
from specforge.prompts.tasks import load_prompt_tasks, make_task, read_prompts
from specforge.prompts.vocabulary import count_loss_tokens

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture
def data(tmp_path, templates):
    """A DataConfig over the given rows, with a ChatML template."""

    def config(*rows, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        template = tmp_path / "chat.jinja"
        template.write_text(templates["chatml"])
        return DataConfig(path=path, **{"chat_template": template, **options})

    return config


def test_texts_and_conversations_become_tasks_in_file_order(data, tokenizer):
    tasks = load_prompt_tasks(data({"text": "hello there"}, CHAT), tokenizer)
    assert [task.index for task in tasks] == [0, 1]
    assert tasks[0].loss_spans == ((0, tasks[0].num_tokens),)
    assert tokenizer.decode(tasks[1].input_ids[slice(*tasks[1].loss_spans[0])]) == "yes<|im_end|>"


def test_sample_id_is_a_function_of_position_and_tokens():
    task = make_task(7, [1, 2, 3], [(0, 3)])
    assert task.sample_id == "00000007-4636993d3e1d"
    assert make_task(7, [1, 2, 3], [(1, 3)]).sample_id == task.sample_id
    assert make_task(7, [1, 2, 4], [(0, 3)]).sample_id != task.sample_id


def test_reading_twice_gives_the_same_tasks(data, tokenizer):
    config = data(CHAT, {"text": "again"}, CHAT)
    assert load_prompt_tasks(config, tokenizer) == load_prompt_tasks(config, tokenizer)


def test_long_sample_is_cut_at_the_end_with_its_spans(data, tokenizer):
    whole = load_prompt_tasks(data(CHAT), tokenizer)[0]
    start, end = whole.loss_spans[0]
    prompts = read_prompts(data(CHAT, max_length=start + 1), tokenizer)
    assert prompts.num_truncated == 1
    assert prompts.tasks[0].input_ids == whole.input_ids[: start + 1]
    assert prompts.tasks[0].loss_spans == ((start, start + 1),)
    assert end > start + 1


def test_sample_without_a_loss_token_is_skipped_and_counted(data, tokenizer):
    question = {"messages": [{"role": "user", "content": "hello"}]}
    prompts = read_prompts(data(question, CHAT), tokenizer)
    assert (len(prompts.tasks), prompts.num_without_loss) == (1, 1)
    assert prompts.tasks[0].index == 0
    assert "1 skipped" in prompts.summary


def test_samples_that_are_cut_or_skipped_are_warned_of(data, tokenizer, caplog):
    load_prompt_tasks(data(CHAT), tokenizer)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    load_prompt_tasks(data({"messages": CHAT["messages"][:1]}, CHAT), tokenizer)
    assert "1 samples from 2 lines, 1 skipped" in caplog.text


def test_samples_that_are_all_skipped_are_an_error(data, tokenizer):
    with pytest.raises(DataError, match=r"no sample is left .*1 skipped"):
        load_prompt_tasks(data(CHAT, min_loss_tokens=100), tokenizer)


def test_empty_file_is_an_error(data, tokenizer):
    with pytest.raises(DataError, match="the file is empty"):
        load_prompt_tasks(data(), tokenizer)


def test_first_bad_line_names_file_and_line(data, tokenizer):
    with pytest.raises(DataError, match=r"data\.jsonl line 2: one JSON object"):
        load_prompt_tasks(data(CHAT, "{oops"), tokenizer)


def test_bad_lines_within_the_budget_are_skipped_and_the_next_one_is_an_error(data, tokenizer):
    rows = [CHAT, "{oops", CHAT]
    assert read_prompts(data(*rows, max_invalid=1), tokenizer).num_invalid == 1
    with pytest.raises(DataError, match="line 4"):
        read_prompts(data(*rows, "{oops", max_invalid=1), tokenizer)


def test_limit_takes_the_first_samples(data, tokenizer):
    assert len(load_prompt_tasks(data(CHAT, CHAT, CHAT, limit=2), tokenizer)) == 2


def test_conversations_without_any_chat_template_are_one_sentence(data, tokenizer):
    with pytest.raises(DataError, match=r"line 1: .*set data\.chat_template"):
        load_prompt_tasks(data(CHAT, chat_template=None), tokenizer)


def test_texts_need_no_chat_template(data, tokenizer):
    assert len(load_prompt_tasks(data({"text": "hello there"}, chat_template=None), tokenizer)) == 1


def test_recorded_tokens_are_taken_as_they_are(data, tokenizer):
    row = {"input_ids": [5, 6, 7], "loss_spans": [[1, 3]], "attributes": {"module": "os"}}
    task = load_prompt_tasks(data(row, format="tokens", chat_template=None), tokenizer)[0]
    assert (task.input_ids, task.loss_spans, task.attributes) == ((5, 6, 7), ((1, 3),), {"module": "os"})


def test_chat_template_file_that_is_missing_is_one_sentence(data, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"data\.chat_template"):
        load_prompt_tasks(data(CHAT, chat_template=tmp_path / "no.jinja"), tokenizer)


def test_counts_are_of_tokens_under_the_loss():
    tasks = [make_task(0, [5, 6, 7, 6], [(1, 2), (3, 4)]), make_task(1, [7, 7], [(0, 2)])]
    assert count_loss_tokens(iter(tasks), 8) == [0, 0, 0, 0, 0, 0, 2, 2]


def test_token_that_the_target_does_not_know_is_an_error():
    with pytest.raises(DataError, match="token id 9"):
        count_loss_tokens([make_task(0, [1, 9], [(0, 2)])], 8)
