from pathlib import Path

import pytest
import torch

from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest, StoredFeatures
from specforge.data_plane.retention import RetainingFeatureStore
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.errors import FeatureNotFound
from specforge.launch.aside import AsideReader


class Ranks:
    """Stores of a leader, which puts features aside, and of a follower, over the same two directories."""

    def __init__(self, directory: Path) -> None:
        self.leader = RetainingFeatureStore(*self._stores(directory))
        inner, (aside,) = self._stores(directory)
        self.follower = AsideReader(inner, aside)
        self.aside = aside

    @staticmethod
    def _stores(directory: Path) -> tuple[SharedDirFeatureStore, list[SharedDirFeatureStore]]:
        return SharedDirFeatureStore(directory / "live", "run"), [SharedDirFeatureStore(directory / "aside", "run")]


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, dtype=torch.int32), "last": torch.full((3, 4), value)}


def ref(sample_id: str, stored: StoredFeatures) -> SampleRef:
    return SampleRef(
        sample_id=sample_id,
        generation=1,
        num_tokens=3,
        loss_spans=((0, 3),),
        store=stored.store,
        key=stored.key,
        num_bytes=stored.num_bytes,
        features=stored.features,
        target_revision="t",
        capture_fingerprint="c",
        worker_id="w",
    )


@pytest.fixture
def ranks(tmp_path) -> Ranks:
    return Ranks(tmp_path)


def test_a_follower_reads_what_the_leader_put_aside_with_the_same_ref(ranks):
    names = ["a", "b"]
    stored = ranks.follower.put([PutRequest(name, 1, tensors(index)) for index, name in enumerate(names)])
    refs = [ref(name, features) for name, features in zip(names, stored, strict=True)]
    assert ranks.leader.retain(refs[:1]) == [True]
    assert ranks.follower.live(refs) == [True, True]
    lent = ranks.follower.get(refs)
    assert [float(found["last"][0, 0]) for found, _ in lent] == [0.0, 1.0]
    assert len({handle.token for _, handle in lent}) == 2
    assert (ranks.aside.health().num_handles, ranks.follower.health().num_handles) == (1, 1)
    ranks.follower.release([handle for _, handle in lent])
    assert (ranks.aside.health().num_handles, ranks.follower.health().num_handles) == (0, 0)


def test_features_that_are_in_neither_place_are_not_found_and_nothing_stays_lent(ranks):
    stored = ranks.follower.put([PutRequest(name, 1, tensors(0.0)) for name in ("a", "b")])
    refs = [ref(name, features) for name, features in zip(("a", "b"), stored, strict=True)]
    ranks.leader.abort([("b", 1)])
    with pytest.raises(FeatureNotFound, match="'b'"):
        ranks.follower.get(refs)
    assert ranks.follower.health().num_handles == 0


def test_an_abort_of_a_follower_leaves_what_was_put_aside(ranks):
    [stored] = ranks.follower.put([PutRequest("a", 1, tensors(2.0))])
    kept = ref("a", stored)
    ranks.leader.retain([kept])
    ranks.follower.abort([("a", 1)])
    [(found, handle)] = ranks.follower.get([kept])
    assert float(found["last"][0, 0]) == 2.0
    ranks.follower.release([handle])
