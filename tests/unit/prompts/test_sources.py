import json

import pytest

from specforge.errors import DataError
from specforge.prompts.sources import numbered_lines, parse_line


def parse(row, data_format="auto"):
    return parse_line(json.dumps(row).encode(), data_format)


def test_format_is_detected_line_by_line():
    assert parse({"text": "a"}).text == "a"
    assert parse({"messages": [{"role": "user", "content": "a"}]}).messages == ({"role": "user", "content": "a"},)
    sharegpt = parse({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    assert [m["role"] for m in sharegpt.messages] == ["user", "assistant"]


def test_text_parts_of_a_message_are_joined():
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert parse(row).messages[0]["content"] == "ab"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{", "this line alone is not JSON"),
        (b"[", "rewritten as JSONL"),
        (b"[1]", "got a list"),
        (b"3", "got a number"),
        (b'{"prompt": "a"}', "was expected, got 'prompt'"),
        (b"{}", "got none"),
        (b'{"text": ""}', "got an empty text"),
        (b'{"text": 3}', "got a number"),
        (b'{"messages": []}', "got an empty list"),
        (b'{"messages": {"role": "user"}}', "got an object"),
        (b'{"messages": ["hi"]}', 'message 0 should have a text as "role"'),
        (b'{"messages": [{"role": "user"}]}', 'message 0 should have a text as "content", got nothing'),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "only text"),
        (b'{"conversations": [{"from": "alien", "value": "x"}]}', "from 'alien'"),
        (b'{"conversations": [{"from": "gpt"}]}', '"from" and "value"'),
        (b'{"text": "\xff"}', "byte 10 of the line"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_line_is_one_sentence(line, sentence):
    with pytest.raises(DataError) as caught:
        parse_line(line)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"input_ids": []}, "list of token ids"),
        ({"input_ids": [1, True], "loss_spans": []}, "list of token ids"),
        ({"input_ids": [1, -1], "loss_spans": []}, "list of token ids"),
        ({"input_ids": [1, 2]}, "pairs"),
        ({"input_ids": [1, 2], "loss_spans": [[1, 3]]}, "within the 2 tokens"),
        ({"input_ids": [1, 2], "loss_spans": [[1, 2], [0, 1]]}, "ascending"),
        ({"input_ids": [1, 2], "loss_spans": [], "attributes": {"a": 1}}, "object of texts"),
        ({"input_ids": [1, 2], "loss_spans": [], "sample_id": "../a"}, '"sample_id" should be 1 to 128'),
        ({"input_ids": [1, 2], "loss_spans": [], "sample_id": ""}, '"sample_id" should be 1 to 128'),
        ({"input_ids": [1, 2], "loss_spans": [], "sample_id": 7}, '"sample_id" should be 1 to 128'),
    ],
)
def test_recorded_tokens_that_contradict_themselves_are_refused(row, sentence):
    with pytest.raises(DataError, match=sentence):
        parse(row)


def test_format_that_is_asked_for_is_not_guessed():
    with pytest.raises(DataError, match='"text" should be a text'):
        parse({"messages": [{"role": "user", "content": "a"}]}, "text")


def test_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    lines = list(numbered_lines(path))
    assert [number for number, _ in lines] == [1, 4]
    assert [parse_line(line).text for _, line in lines] == ["a", "b"]


def test_file_is_read_as_it_is_needed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    lines = numbered_lines(path)
    next(lines)
    with path.open("ab") as file:
        file.write(b'{"text": "b"}\n')
    assert [number for number, _ in lines] in ([], [2])


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_file_that_cannot_be_read_is_one_sentence(tmp_path, name):
    with pytest.raises(DataError, match=r"no such file|is a directory"):
        list(numbered_lines(tmp_path / name))
