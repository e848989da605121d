import pytest
import torch

from specforge.errors import ConfigError, RunFailed
from specforge.launch.group import Seat, lost_peer, torchrun_seat
from specforge.training.ranks import Ranks, Rendezvous

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_torchrun_says_which_rank_this_process_is():
    assert torchrun_seat(TORCHRUN) == Seat(1, 2, "env://")


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, TORCHRUN | {"WORLD_SIZE": "1"}])
def test_a_process_by_itself_is_no_rank(environment):
    assert torchrun_seat(environment) is None


def test_an_environment_that_is_not_whole_is_refused():
    with pytest.raises(ConfigError, match="has RANK and WORLD_SIZE=2 but no MASTER_PORT: start the run with torchrun"):
        torchrun_seat({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"})


def test_ranks_on_several_hosts_are_refused():
    with pytest.raises(ConfigError, match="torchrun started 4 ranks, 2 of them on this host"):
        torchrun_seat(TORCHRUN | {"WORLD_SIZE": "4"})


def test_a_single_rank_meets_nobody():
    ranks = Seat().join(torch.device("cpu"), 1)
    assert (ranks.size, ranks.is_leader) == (1, True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7316"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error: Connection reset by peer"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:465] writev [127.0.0.1]:7316: Broken pipe"), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"), False),
        (torch.distributed.DistStoreError("wait timeout after 1000ms"), False),
        (RuntimeError("[gloo/types.h:81] op.preamble.length <= op.nbytes. 16 vs 8"), False),
        (RunFailed("the checkpoint of step 3 could not be written (rank 1: RuntimeError: Broken pipe)"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed"), False),
    ],
)
def test_only_a_lost_connection_is_the_loss_of_a_rank(error, expected):
    assert lost_peer(error) is expected


def test_a_failure_that_a_lost_rank_caused_is_one_too():
    failure = RunFailed("the step failed")
    failure.__cause__ = RuntimeError("Gloo: connection reset")
    assert lost_peer(failure)
    failure.__cause__ = OSError("no space left on device")
    assert not lost_peer(failure)


def test_ranks_meet_in_a_directory_of_any_name(tmp_path, monkeypatch):
    meeting = tmp_path / "a b#c%20d" / "1"
    meeting.parent.mkdir()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    ranks = Ranks.join(Rendezvous(f"file://{meeting}", 0, 1))
    try:
        assert meeting.exists()
        assert ranks.main.sum([2.0]) == [2.0]
    finally:
        ranks.leave()
