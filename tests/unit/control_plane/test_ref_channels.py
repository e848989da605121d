"""Every carrier against the suite, what the file and the network add, and the queues."""

import json
import stat
import threading

import pytest
from served import Served

from specforge.contracts import codec
from specforge.contracts.refs import Slot
from specforge.control_plane.channel.file import FileRefReader, FileRefWriter
from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.channel.network import NetworkRefReader, RefStream
from specforge.control_plane.channel.queue import SampleRefQueue, StreamingRefQueue
from specforge.control_plane.wire import PollBody
from specforge.errors import ChannelClosed, ConfigError, ControlPlaneError, InvalidTransition, ProducerFailed
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


@pytest.fixture
def served():
    served = Served(consumers=["rank 0", "rank 1"])
    yield served
    served.close()


class TestNetworkChannel(RefChannelSuite):
    @pytest.fixture(autouse=True)
    def _server(self):
        self.served = Served(consumers=["rank 0"])
        yield
        self.served.close()

    def make_channel(self):
        return self.served.stream, NetworkRefReader(self.served.client, "rank 0")


REFS = [make_slot_ref(i) for i in range(6)]


def test_every_consumer_sees_the_whole_stream_and_the_slowest_counts(served):
    readers = [NetworkRefReader(served.client, f"rank {i}") for i in range(2)]
    served.stream.publish(REFS[:4])
    assert readers[0].poll(9) == REFS[:4]
    readers[0].mark_consumed(4)
    assert served.stream.in_flight() == 4
    assert readers[1].poll(1) == REFS[:1]
    readers[1].mark_consumed(1)
    assert served.stream.in_flight() == 3
    served.stream.publish(REFS[4:])
    served.stream.close()
    assert [list(reader.stream()) for reader in readers] == [REFS[4:], REFS[1:]]
    assert all(reader.ended for reader in readers)
    readers[1].mark_consumed(5)
    assert served.stream.in_flight() == 2


def test_a_new_reader_begins_with_what_was_not_consumed(served):
    reader = NetworkRefReader(served.client, "rank 0")
    served.stream.publish(REFS)
    assert reader.poll(4) == REFS[:4]
    reader.mark_consumed(2)
    again = NetworkRefReader(served.client, "rank 0")
    assert again.poll(9) == REFS[2:]
    again.mark_consumed(4)
    NetworkRefReader(served.client, "rank 1").poll(9)
    served.client.consume_refs("rank 1", served.stream.stream_id, 6)
    assert served.stream.in_flight() == 0


def test_a_poll_or_mark_that_comes_again_changes_nothing(served):
    served.stream.publish(REFS[:4])
    body = PollBody("rank 0", served.stream.stream_id, 1, 2, 0.0)
    assert [served.client.poll_refs(body).refs for _ in range(2)] == [tuple(REFS[1:3])] * 2
    for num_refs in (3, 3, 2):
        for consumer in ("rank 0", "rank 1"):
            served.client.consume_refs(consumer, served.stream.stream_id, num_refs)
    assert served.stream.in_flight() == 1


def test_the_reader_of_a_controller_that_was_started_again_is_told(served):
    reader = NetworkRefReader(served.client, "rank 0")
    served.stream.publish(REFS[:2])
    reader.poll(1)
    served.server.stop()
    served.options["stream"] = RefStream(["rank 0"])
    served.options["stream"].publish(REFS)
    served.restart()
    for ask in (lambda: reader.poll(1), lambda: reader.mark_consumed(1)):
        with pytest.raises(ControlPlaneError, match="started again"):
            ask()


def test_wrong_consumers_and_positions_are_refused(served):
    served.stream.publish(REFS[:2])
    stream_id = served.stream.stream_id
    with pytest.raises(ControlPlaneError, match=r"'rank 0', 'rank 1', got 'rank 2'"):
        NetworkRefReader(served.client, "rank 2").poll(1, 0.0)
    with pytest.raises(ControlPlaneError, match="3 refs of 2 that were published"):
        served.client.consume_refs("rank 0", stream_id, 3)
    with pytest.raises(ControlPlaneError, match="asks for ref 3"):
        served.client.poll_refs(PollBody("rank 0", stream_id, 3, 1, 0.0))
    served.client.consume_refs("rank 0", stream_id, 2)
    with pytest.raises(ControlPlaneError, match="each consumer has one reader"):
        served.client.poll_refs(PollBody("rank 0", stream_id, 1, 1, 0.0))
    with pytest.raises(ControlPlaneError, match="before any was polled"):
        NetworkRefReader(served.client, "rank 0").mark_consumed(1)
    for consumers in ([], ["rank 0", "rank 0"]):
        with pytest.raises(ConfigError, match="consumers"):
            RefStream(consumers)


def test_a_run_without_a_stream_says_so():
    served = Served()
    with pytest.raises(ControlPlaneError, match="streams no refs over the network"):
        NetworkRefReader(served.client, "rank 0").poll(1, 0.0)
    served.close()


@pytest.mark.parametrize("published", [0, 3])
def test_silence_on_an_open_stream_is_an_error_that_says_what_to_check(published):
    writer, reader = memory_channel()
    queue = StreamingRefQueue(reader, idle_timeout_s=0.05)
    writer.publish(REFS[:published])
    with pytest.raises(ControlPlaneError, match=rf"silent: {4 - published} more slots.*0\.05 s.*workers"):
        queue.get(4)
    writer.publish(REFS[published:4])
    assert queue.get(4) == REFS[:4]
    writer.close()
    assert queue.get(4) == []


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
