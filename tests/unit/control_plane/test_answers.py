"""Answers are given once a key, kept within bounds, and forgotten when they are not final."""

import asyncio

import pytest

from specforge.control_plane.answers import Answer, Answers
from specforge.errors import ContractError


class Work:
    """Answers with ``body``; counts how often it was asked."""

    def __init__(self, body=b"done", *, final=True):
        self.answer = Answer(200, body, final)
        self.times = 0

    async def __call__(self):
        self.times += 1
        await asyncio.sleep(0)
        return self.answer


def asked(answers, key, work, times=1, what=("call", b"body")):
    """``times`` at the same time."""

    async def ask():
        return await asyncio.gather(*(answers.once(key, what, work) for _ in range(times)))

    return asyncio.run(ask())


def test_a_key_is_carried_out_once_however_often_it_comes_and_when():
    answers, work = Answers(), Work()
    assert asked(answers, "a", work, times=5) + asked(answers, "a", work) == [work.answer] * 6
    assert work.times == 1


def test_another_call_with_a_used_key_is_refused():
    answers, work = Answers(), Work()
    asked(answers, "a", work)
    for what in [("other", b"body"), ("call", b"other")]:
        with pytest.raises(ContractError, match="used for another call"):
            asked(answers, "a", work, what=what)
    assert work.times == 1


def test_what_is_not_final_or_breaks_is_made_anew_by_who_waits():
    answers, work = Answers(), Work(final=False)
    assert asked(answers, "a", work, times=3) == [work.answer] * 3
    assert work.times == 3

    async def broken():
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        asked(answers, "b", broken)
    assert asked(answers, "b", Work()) == [Answer(200, b"done")]


@pytest.mark.parametrize("bounds", [{"max_answers": 3}, {"max_bytes": 30}])
def test_the_answers_used_last_are_kept(bounds):
    answers, work = Answers(**bounds), Work(b"x" * 10)
    for key in ("a", "b", "c", "a", "d"):
        asked(answers, key, work)
    assert work.times == 4
    for key in ("a", "c", "d"):
        asked(answers, key, work)
    assert work.times == 4
    asked(answers, "b", work)
    assert work.times == 5


def test_an_answer_larger_than_the_bound_is_given_and_not_kept():
    answers, work = Answers(max_bytes=5), Work(b"x" * 10)
    assert asked(answers, "a", work) == [work.answer]
    asked(answers, "a", work)
    assert work.times == 2
