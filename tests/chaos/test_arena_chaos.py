"""The arena's chaos, short: ``make chaos`` runs it for longer."""

import multiprocessing
import os

import arena_chaos
import arena_roles
import psutil
import pytest

from specforge.data_plane.shared_memory import SHARED_MEMORY
from specforge.testing.feature_store import make_ref, put_one


@pytest.mark.timeout(180)
def test_random_kills_of_writers_readers_and_collectors_break_no_promise():
    before = {path.name for path in SHARED_MEMORY.glob("specforge-chaos-*")}
    result = arena_chaos.chaos(20.0, seed=1)
    assert result["violations"] == 0
    assert set(result["kills"]) == set(arena_chaos.TEAM)
    assert min(result[count] for count in ("puts", "gets", "gets_of_aborted", "aborts", "checks", "moves")) > 0
    assert {path.name for path in SHARED_MEMORY.glob("specforge-chaos-*")} <= before
    server = {child for child in psutil.Process(os.getpid()).children() if "forkserver" in " ".join(child.cmdline())}
    assert all(not child.children() for child in server)
    assert not multiprocessing.active_children()


def test_reader_of_the_chaos_complains_about_other_bytes(tmp_path):
    store = arena_roles.SharedMemoryFeatureStore.create(arena_roles.RUN, arena_chaos.CAPACITY, 16, tmp_path)
    good = put_one(store, "good", arena_roles.pattern("good", 1, 1003))
    wrong = put_one(store, "wrong", arena_roles.pattern("other", 1, 1003))
    [(good_tensors, _), (wrong_tensors, _)] = store.get([good, wrong])
    assert not arena_roles.differs(good, good_tensors)
    assert arena_roles.differs(wrong, wrong_tensors)
    store.close()


@pytest.mark.parametrize(
    ("asked", "found", "complaint"), [(True, True, "after its abort"), (False, False, "is lost"), (False, True, "")]
)
def test_parent_of_the_chaos_complains_about_gets_that_cannot_be(tmp_path, asked, found, complaint):
    store = arena_roles.SharedMemoryFeatureStore.create(arena_roles.RUN, arena_chaos.CAPACITY, 16, tmp_path)
    [stored] = store.put([arena_roles.PutRequest("a", 1, arena_roles.pattern("a", 1, 64))])
    store.close()
    parent = arena_chaos.ArenaChaos(tmp_path, seed=0)
    sample = arena_chaos.Sample(make_ref("a", 1, stored))
    if complaint:
        with pytest.raises(arena_chaos.Violation, match=complaint):
            parent.heard_get([(sample, asked)], [found])
    else:
        parent.heard_get([(sample, asked)], [found])
