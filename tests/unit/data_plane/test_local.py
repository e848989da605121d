import torch

from specforge.data_plane.base import FeatureStore
from specforge.data_plane.local import LocalFeatureStore
from specforge.testing.feature_store import FeatureStoreSuite, put_one


class TestLocalFeatureStore(FeatureStoreSuite):
    def make_store(self, capacity_bytes: int) -> FeatureStore:
        return LocalFeatureStore(capacity_bytes)


def test_tensors_are_kept_by_reference():
    store = LocalFeatureStore()
    tensor = torch.ones(5)
    [(tensors, _)] = store.get([put_one(store, "a", {"x": tensor})])
    assert tensors["x"].data_ptr() == tensor.data_ptr()


def test_freed_tensors_are_let_go_of():
    store = LocalFeatureStore()
    [(_, handle)] = store.get([put_one(store, "a", {"x": torch.ones(5)})])
    store.abort([("a", 1)])
    assert store.health().live_bytes == 64
    store.release([handle])
    assert store.health().live_bytes == 0
