"""Benchmark questions and samples up to their answer, as prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from specforge.errors import DataError
from specforge.prompts.questions import Question, QuestionEncoder, chosen_in_turn, question_of, read_questions

SAMPLES = Path(__file__).parents[3] / "examples/evaluation"
EXPECTED = {
    "mt_bench.jsonl": (13, {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}),
    "gsm8k.jsonl": (6, {"gsm8k"}),
    "humaneval.jsonl": (4, {"humaneval"}),
    "alpaca.json": (6, {"alpaca", "rewriting"}),
    "conversations.jsonl": (3, {"conversations", "geography"}),
}


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast, templates: dict[str, str], tmp_path: Path) -> QuestionEncoder:
    template = tmp_path / "chat.jinja"
    template.write_text(templates["chatml"])
    return QuestionEncoder(tokenizer, 5, template)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", [path.name for path in SAMPLES.iterdir() if path.suffix != ".md"])
def test_every_sample_file_loads(name: str, chat: QuestionEncoder):
    questions = read_questions(SAMPLES / name)
    assert (len(questions), {question.category for question in questions}) == EXPECTED[name]
    assert all(chat.encode(question) for question in questions)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question_id": 1, "category": "math", "turns": ["first?", "second?"]}, "first?"),
        ({"question": "how many?", "answer": "#### 4"}, "how many?"),
        ({"task_id": "x/1", "prompt": "def f():\n", "test": "", "entry_point": "f"}, "def f():\n"),
        ({"instruction": "sort", "input": "b a", "output": "a b", "text": "all of it"}, "sort\n\nb a"),
        ({"instruction": "sing", "input": "", "output": "la"}, "sing"),
    ],
)
def test_format_follows_from_the_keys(
    row: dict[str, Any], text: str, chat: QuestionEncoder, tokenizer: PreTrainedTokenizerFast
):
    question = question_of(row, 1, "file")
    assert question.text == text
    assert question.category == row.get("category", "file")
    rendered = tokenizer.decode(chat.encode(question))
    assert rendered == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_conversation_is_asked_up_to_its_first_answer(chat: QuestionEncoder, tokenizer: PreTrainedTokenizerFast):
    turns = [("system", "be kind"), ("user", "hello"), ("assistant", "yes"), ("user", "again")]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.decode(chat.encode(question_of({"messages": messages}, 1, "file")))
    assert whole == tokenizer.decode(chat.encode(question_of({"messages": messages[:2]}, 1, "file")))
    assert whole.endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(DataError, match="begins with an answer"):
        chat.encode(question_of({"messages": messages[2:]}, 1, "file"))


def test_texts_and_recorded_tokens_have_a_beginning(chat: QuestionEncoder, tokenizer: PreTrainedTokenizerFast):
    text = "the user asks and the assistant answers"
    assert chat.encode(question_of({"text": text}, 1, "f")) == tuple(tokenizer(text)["input_ids"][:5])
    row = {"input_ids": list(range(9)), "loss_spans": [[3, 9]]}
    assert chat.encode(question_of(row, 1, "f")) == (0, 1, 2)
    assert chat.encode(question_of(row | {"loss_spans": [[0, 9]]}, 1, "f")) == (0, 1, 2, 3, 4)
    assert chat.encode(question_of(row | {"loss_spans": []}, 1, "f")) == tuple(range(9))


def test_question_is_plain_text_without_a_template_or_where_that_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, templates: dict[str, str]
):
    question = Question(1, "a", text="hello there")
    plain = tuple(tokenizer("hello there")["input_ids"])
    assert QuestionEncoder(tokenizer, 5).encode(question) == plain
    tokenizer.chat_template = templates["chatml"]
    try:
        assert QuestionEncoder(tokenizer, 5).encode(question) != plain
        assert QuestionEncoder(tokenizer, 5, as_text=True).encode(question) == plain
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"prompt": "x", "id": 3},
            r"the keys 'id', 'prompt' are those of no format \(MT-Bench: turns; GSM8K: question",
        ),
        ({"turns": []}, r'"turns\[0\]" should be a text that is not empty, got None'),
        ({"turns": "why?"}, r'"turns\[0\]" should be a text that is not empty'),
        ({"question": " ", "answer": "4"}, '"question" should be a text'),
        ({"instruction": "do", "input": 4}, '"input" should be a text that is not empty, got 4'),
        ({"instruction": "do", "category": 7}, '"category" should be a text, got 7'),
    ],
)
def test_bad_row_is_named_with_its_place(row: dict[str, Any], sentence: str, tmp_path: Path):
    file = write(tmp_path / "questions.jsonl", {"instruction": "fine"}, row)
    with pytest.raises(DataError, match=rf"questions\.jsonl line 2: {sentence}"):
        read_questions(file)


def test_files_that_are_no_list_of_questions_are_refused(tmp_path: Path):
    for content, sentence in (
        (b"", "the file is empty"),
        (b"[]", "the file is empty"),
        (b"[1, 2]", "items are no objects"),
        (rb'[{"text": "fine"}, {"text": "\ud800"}]', "line 2: a text holds half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[{]", "a JSON array of objects was expected"),
        (b"\x1f\x8b\x08abc", "unpack it with gunzip"),
        (b"no json\n", "line 1: one JSON object a line was expected"),
    ):
        file = tmp_path / "file.jsonl"
        file.write_bytes(content)
        with pytest.raises(DataError, match=sentence):
            read_questions(file)


def test_few_prompts_are_of_all_categories():
    questions = [Question(i, category, text="?") for i, category in enumerate("aaaabbbc")]
    assert [question.line for question in chosen_in_turn(questions, 4)] == [0, 1, 4, 7]
    assert chosen_in_turn(questions, 99) == questions
    assert [q.line for q in chosen_in_turn([Question(i, "a", text="?") for i in range(5)], 2)] == [0, 1]
