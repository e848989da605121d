"""Both carriers against the suite, what the file carrier adds, and the queues."""

import json
import stat
import threading

import pytest

from specforge.contracts import codec
from specforge.contracts.refs import Slot
from specforge.control_plane.channel.file import FileRefReader, FileRefWriter
from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.channel.queue import SampleRefQueue, StreamingRefQueue
from specforge.errors import ChannelClosed, ControlPlaneError, InvalidTransition, ProducerFailed
from specforge.testing.ref_channel import RefChannelSuite, make_slot_ref


class TestMemoryChannel(RefChannelSuite):
    def make_channel(self):
        return memory_channel()


class TestFileChannel(RefChannelSuite):
    @pytest.fixture(autouse=True)
    def _path(self, tmp_path):
        self.path = tmp_path / "refs.jsonl"

    def make_channel(self):
        return FileRefWriter(self.path), FileRefReader(self.path, poll_interval_s=0.005)


REFS = [make_slot_ref(i) for i in range(6)]


def test_a_torn_line_is_not_read_until_it_is_whole(tmp_path):
    path = tmp_path / "refs.jsonl"
    reader = FileRefReader(path)
    assert reader.poll(1, 0.0) == []
    line = codec.dumps(REFS[0]).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        file.write(line[:40])
        assert reader.poll(1, 0.0) == []
        file.write(line[40:])
        assert reader.poll(1, 0.0) == [REFS[0]]


def test_a_new_writer_cuts_off_what_a_dead_one_left_unfinished(tmp_path):
    path = tmp_path / "refs.jsonl"
    writer, reader = FileRefWriter(path), FileRefReader(path)
    writer.publish(REFS[:2])
    with path.open("ab") as file:
        file.write(b'{"type":"Slot')
    assert reader.poll(9, 0.0) == REFS[:2]
    again = FileRefWriter(path)
    again.publish(REFS[2:3])
    assert reader.poll(9, 0.0) == REFS[2:3]
    assert again.in_flight() == 3
    again.close()
    writer.close()


def test_a_writer_of_an_ended_channel_publishes_nothing_more(tmp_path):
    path = tmp_path / "refs.jsonl"
    FileRefWriter(path).close()
    again = FileRefWriter(path)
    with pytest.raises(ChannelClosed):
        again.publish(REFS[:1])
    again.close()


def test_a_restarted_reader_knows_what_was_consumed(tmp_path):
    path = tmp_path / "refs.jsonl"
    writer, reader = FileRefWriter(path), FileRefReader(path)
    writer.publish(REFS[:4])
    reader.poll(4)
    reader.mark_consumed(2)
    again = FileRefReader(path)
    queue = StreamingRefQueue(again, skip_ids=frozenset())
    assert queue.get(4) == REFS[:4]
    again.mark_consumed(1)
    assert writer.in_flight() == 1
    writer.close()


def test_the_channel_file_is_private_and_rubbish_in_it_is_an_error(tmp_path):
    path = tmp_path / "refs.jsonl"
    writer, reader = FileRefWriter(path), FileRefReader(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("rubbish\n")
    with pytest.raises(ControlPlaneError, match="not JSON"):
        reader.poll(1)
    path.write_text(json.dumps({"fail": "of this reason"}) + "\n")
    with pytest.raises(ProducerFailed, match="of this reason"):
        FileRefReader(path).poll(1)
    writer.close()


def test_get_blocks_until_exactly_the_wanted_slots_are_there():
    writer, reader = memory_channel()
    queue = StreamingRefQueue(reader)
    got = []
    thread = threading.Thread(target=lambda: got.append(queue.get(4)))
    thread.start()
    for ref in REFS[:4]:
        writer.publish([ref])
    thread.join(20)
    assert got == [REFS[:4]]
    writer.publish(REFS[4:])
    writer.close()
    assert queue.get(4) == REFS[4:]
    assert queue.get(4) == []


def test_get_raises_when_the_producer_failed_while_it_waited():
    writer, reader = memory_channel()
    queue = StreamingRefQueue(reader)
    failures = []

    def read():
        try:
            queue.get(4)
        except ProducerFailed as error:
            failures.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    writer.publish(REFS[:1])
    writer.fail("no more memory")
    thread.join(20)
    assert failures == ["no more memory"]


def test_skipped_slots_are_consumed_unseen():
    writer, reader = memory_channel()
    queue = StreamingRefQueue(reader, skip_ids=frozenset({Slot(0, 0), Slot(0, 2)}))
    writer.publish(REFS[:4])
    assert queue.get(2) == [REFS[1], REFS[3]]
    assert writer.in_flight() == 2
    queue.ack([REFS[1], REFS[3]])
    assert writer.in_flight() == 0


def test_failed_slots_come_again_first_and_in_order():
    writer, reader = memory_channel()
    queue = StreamingRefQueue(reader)
    writer.publish(REFS[:4])
    queue.fail(queue.get(2))
    assert queue.get(3) == REFS[:3]


def test_sample_queue_redelivers_failed_and_expired_leases():
    now = [0.0]
    queue = SampleRefQueue(num_partitions=2, lease_s=10.0, clock=lambda: now[0])
    queue.put(REFS[:3], partition=1)
    assert queue.get(0, 1, timeout_s=0.0) == []
    assert queue.get(1, 2) == REFS[:2]
    queue.fail(1, [REFS[1].slot])
    assert queue.get(1, 1) == [REFS[1]]
    queue.ack(1, [REFS[1].slot])
    now[0] = 10.0
    assert queue.get(1, 9) == [REFS[0], REFS[2]]
    with pytest.raises(InvalidTransition):
        queue.ack(1, [REFS[0].slot, REFS[1].slot])
    queue.ack(1, [REFS[0].slot])


def test_a_closed_sample_queue_ends_when_the_last_lease_is_acked():
    queue = SampleRefQueue()
    queue.put(REFS[:1])
    queue.close()
    with pytest.raises(ChannelClosed):
        queue.put(REFS[:1])
    assert queue.get(0, 2) == REFS[:1]
    got = []
    thread = threading.Thread(target=lambda: got.append(queue.get(0, 2)))
    thread.start()
    queue.ack(0, [REFS[0].slot])
    thread.join(20)
    assert got == [[]]
