"""The loss mask of conversations, judged by the text of the supervised tokens."""

import pytest

from specforge.errors import DataError
from specforge.prompts.chat import ChatEncoder

USER = {"role": "user", "content": "hello there"}
ANSWER = {"role": "assistant", "content": "yes, think"}
MORE = {"role": "user", "content": "again?"}
SECOND = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "the system message"}

TURN_END = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot|>",
    "mistral": "</s>",
    "marked": "<|im_end|>",
    "marked_without_turn_end": "<|im_end|>",
    "drops_reasoning": "<|im_end|>",
    "prompts_reasoning": "<|im_end|>",
    "no_generation_prompt": "<|im_end|>",
}


@pytest.fixture
def supervised(tokenizer, templates):
    """The texts of the supervised spans of a conversation under a template."""

    def texts(name, messages, **options):
        encoded = ChatEncoder(tokenizer, templates[name]).encode(messages, **options)
        return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.loss_spans]

    return texts


@pytest.mark.parametrize("name", list(TURN_END))
def test_each_answer_and_its_turn_end_are_supervised_and_nothing_else(supervised, name):
    end = TURN_END[name]
    spans = supervised(name, [USER, ANSWER, MORE, SECOND])
    assert [span.lstrip(" ") for span in spans] == [f"yes, think{end}", f"no{end}"]


@pytest.mark.parametrize("name", [name for name in TURN_END if name != "mistral"])
def test_system_message_is_not_supervised(supervised, name):
    assert supervised(name, [SYSTEM, USER, ANSWER]) == [f"yes, think{TURN_END[name]}"]


@pytest.mark.parametrize("name", [name for name in TURN_END if name != "marked_without_turn_end"])
def test_empty_answer_supervises_its_turn_end_alone(supervised, name):
    spans = supervised(name, [USER, {"role": "assistant", "content": ""}, MORE, SECOND])
    assert [span.strip() for span in spans] == [TURN_END[name], f"no{TURN_END[name]}"]


@pytest.mark.parametrize("name", list(TURN_END))
def test_last_turn_only_leaves_earlier_answers_out(supervised, name):
    spans = supervised(name, [USER, ANSWER, MORE, SECOND], last_turn_only=True)
    assert [span.lstrip(" ") for span in spans] == [f"no{TURN_END[name]}"]


@pytest.mark.parametrize("name", list(TURN_END))
def test_token_ids_are_the_rendered_conversation(tokenizer, templates, name):
    messages = [USER, ANSWER, MORE, SECOND]
    expected = tokenizer.apply_chat_template(messages, chat_template=templates[name], return_dict=True)["input_ids"]
    assert list(ChatEncoder(tokenizer, templates[name]).encode(messages).input_ids) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "marked", "drops_reasoning"])
def test_the_text_before_a_span_is_what_the_target_sees_when_it_answers(tokenizer, templates, name):
    encoded = ChatEncoder(tokenizer, templates[name]).encode([USER, ANSWER])
    prompt = tokenizer.apply_chat_template(
        [USER], chat_template=templates[name], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(encoded.input_ids[: encoded.loss_spans[0][0]]) == prompt


def test_template_that_drops_earlier_reasoning_supervises_what_is_left_of_it(supervised):
    first = {"role": "assistant", "content": "<think>\nhello\n</think>\n\nyes"}
    last = {"role": "assistant", "content": "<think>\nagain\n</think>\n\nno"}
    assert supervised("drops_reasoning", [USER, first, MORE, last]) == [
        "yes<|im_end|>",
        "<think>\nagain\n</think>\n\nno<|im_end|>",
    ]


def test_generation_prompt_that_opens_reasoning_is_not_supervised(supervised):
    thought = {"role": "assistant", "content": "<think>\nagain\n</think>\n\nno"}
    assert supervised("prompts_reasoning", [USER, thought]) == ["again\n</think>\n\nno<|im_end|>"]


def test_answer_with_the_text_of_the_question_is_told_apart_from_it(supervised):
    assert supervised("drops_reasoning", [USER, {"role": "assistant", "content": "hello there"}]) == [
        "hello there<|im_end|>"
    ]


def test_conversation_that_starts_with_the_assistant(supervised):
    assert supervised("chatml", [ANSWER, USER, SECOND]) == ["yes, think<|im_end|>", "no<|im_end|>"]


def test_several_assistant_messages_in_a_row(supervised):
    assert supervised("chatml", [USER, ANSWER, SECOND]) == ["yes, think<|im_end|>", "no<|im_end|>"]


def test_conversation_without_an_answer_has_no_span(supervised):
    assert supervised("chatml", [SYSTEM, USER]) == []


def test_characters_of_several_tokens_stay_within_their_turn(supervised):
    content = "日本語 😀 é"
    assert supervised("chatml", [{"role": "user", "content": content}, {"role": "assistant", "content": content}]) == [
        f"{content}<|im_end|>"
    ]


def test_template_that_hides_an_answer_is_refused_and_not_guessed(tokenizer):
    upper = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper if not loop.last else m['content'] }}\n"
        "{% endfor %}"
    )
    with pytest.raises(DataError, match="rewrites message 1"):
        ChatEncoder(tokenizer, upper).encode([USER, ANSWER, MORE, SECOND])


def test_template_that_refuses_a_conversation_gives_its_reason(tokenizer, templates):
    with pytest.raises(DataError, match="Only user and assistant roles"):
        ChatEncoder(tokenizer, templates["mistral"]).encode([SYSTEM, USER, ANSWER])


def test_broken_template_is_a_data_error(tokenizer):
    with pytest.raises(DataError, match="refuses the conversation"):
        ChatEncoder(tokenizer, "{% for m in %}").encode([USER, ANSWER])


def test_tokenizer_without_a_chat_template_says_what_to_do(tokenizer):
    with pytest.raises(DataError, match=r"no chat template; set data\.chat_template"):
        ChatEncoder(tokenizer)
