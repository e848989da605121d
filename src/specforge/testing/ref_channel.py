"""Conformance suite of the streaming channel: inherit, give ``make_channel``."""

from __future__ import annotations

import threading

import pytest

from specforge.contracts.refs import Slot, SlotRef
from specforge.control_plane.channel.base import RefReader, RefWriter
from specforge.errors import ChannelClosed, ProducerFailed
from specforge.testing.metadata_store import make_ref, make_task

_DEADLINE_S = 20.0


def make_slot_ref(number: int) -> SlotRef:
    return SlotRef(Slot(0, number), make_ref(make_task(number), 1))


class RefChannelSuite:
    """Both ends in one process; what crosses processes is for the carrier's own tests."""

    def make_channel(self) -> tuple[RefWriter, RefReader]:
        raise NotImplementedError

    @pytest.fixture
    def ends(self) -> tuple[RefWriter, RefReader]:
        return self.make_channel()

    def test_refs_arrive_in_order_and_unchanged(self, ends: tuple[RefWriter, RefReader]) -> None:
        writer, reader = ends
        refs = [make_slot_ref(i) for i in range(5)]
        writer.publish(refs[:3])
        writer.publish(refs[3:])
        assert reader.poll(2, _DEADLINE_S) == refs[:2]
        assert reader.poll(10, _DEADLINE_S) == refs[2:]
        writer.close()

    def test_an_empty_list_means_time_is_up(self, ends: tuple[RefWriter, RefReader]) -> None:
        writer, reader = ends
        assert reader.poll(1, timeout_s=0.0) == []
        assert reader.poll(1, timeout_s=0.01) == []
        assert not reader.ended
        writer.close()

    def test_the_stream_ends_after_everything_published(self, ends: tuple[RefWriter, RefReader]) -> None:
        writer, reader = ends
        refs = [make_slot_ref(i) for i in range(3)]
        writer.publish(refs)
        writer.close()
        writer.close()
        assert not reader.ended
        assert list(reader.stream()) == refs
        assert reader.ended
        assert reader.poll(1) == []

    def test_publishing_after_the_end_is_refused(self, ends: tuple[RefWriter, RefReader]) -> None:
        writer, _ = ends
        writer.close()
        with pytest.raises(ChannelClosed):
            writer.publish([make_slot_ref(0)])

    def test_a_failure_is_never_mistaken_for_an_end(self, ends: tuple[RefWriter, RefReader]) -> None:
        writer, reader = ends
        writer.publish([make_slot_ref(0)])
        writer.fail("the target ran out of memory")
        writer.fail("another reason")
        writer.close()
        for _ in range(2):
            with pytest.raises(ProducerFailed, match="the target ran out of memory"):
                reader.poll(1)
        assert not reader.ended
        with pytest.raises(ChannelClosed):
            writer.publish([make_slot_ref(1)])

    def test_a_failure_after_the_end_changes_nothing(self, ends: tuple[RefWriter, RefReader]) -> None:
        writer, reader = ends
        writer.close()
        writer.fail("too late")
        assert reader.poll(1) == []
        assert reader.ended

    @pytest.mark.parametrize("what", ["publish", "close", "fail"])
    def test_a_blocked_reader_wakes_up_on(self, ends: tuple[RefWriter, RefReader], what: str) -> None:
        writer, reader = ends
        outcome: list[object] = []

        def read() -> None:
            try:
                outcome.extend(reader.poll(1))
            except ProducerFailed as error:
                outcome.append(str(error))

        thread = threading.Thread(target=read)
        thread.start()
        if what == "publish":
            writer.publish([make_slot_ref(0)])
        elif what == "close":
            writer.close()
        else:
            writer.fail("gone")
        thread.join(_DEADLINE_S)
        assert not thread.is_alive()
        assert outcome == {"publish": [make_slot_ref(0)], "close": [], "fail": ["gone"]}[what]
        writer.close()

    def test_the_writer_sees_what_is_in_flight(self, ends: tuple[RefWriter, RefReader]) -> None:
        writer, reader = ends
        writer.publish([make_slot_ref(i) for i in range(3)])
        reader.poll(3)
        assert writer.in_flight() == 3
        reader.mark_consumed(2)
        assert writer.in_flight() == 1
        reader.mark_consumed(1)
        assert writer.in_flight() == 0
        writer.close()
