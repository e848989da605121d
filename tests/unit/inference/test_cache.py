"""The cache that grows in place against the one that concatenates."""

import pytest
import torch
from transformers import DynamicCache

from specforge.contracts.capture import CaptureSpec
from specforge.inference.cache import INITIAL_POSITIONS, GrowingCache
from specforge.inference.huggingface import HFTargetEngine


def states(num_positions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one forward; their head sizes may differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, num_positions, 8, generator=generator), torch.randn(
        2, 3, num_positions, 4, generator=generator
    )


def test_steps_growth_and_crops_give_what_concatenation_gives():
    ours, theirs = GrowingCache(), DynamicCache()
    for seed, (count, removed) in enumerate([(5, 0), (1, 1), (6, 4), (INITIAL_POSITIONS, 3), (2, 0), (700, 650)]):
        for layer in (0, 1):
            found, expected = (cache.update(*states(count, seed), layer) for cache in (ours, theirs))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for cache in (ours, theirs):
            cache.crop(-removed)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.layers[1].keys, theirs.layers[1].keys)
        assert torch.equal(ours.layers[1].values, theirs.layers[1].values)


def test_step_within_the_capacity_keeps_the_buffers():
    cache = GrowingCache()
    keys, _ = cache.update(*states(5, 0), 0)
    longer, _ = cache.update(*states(1, 1), 0)
    assert longer.data_ptr() == keys.data_ptr()


def test_crop_takes_the_number_to_remove():
    cache = GrowingCache()
    cache.update(*states(5, 0), 0)
    with pytest.raises(ValueError, match="minus the number"):
        cache.layers[0].crop(3)


def test_cropped_session_continues_like_one_that_never_saw_the_rest(engine: HFTargetEngine):
    spec = CaptureSpec((0,), True)
    cropped, fresh = engine.session(spec), engine.session(spec)
    cropped.forward([5, 9, 3, 7, 8, 6])
    cropped.crop(3)
    fresh.forward([5, 9, 3])
    found, expected = cropped.forward([4, 2]), fresh.forward([4, 2])
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1]["aux"], expected[1]["aux"], rtol=0, atol=1e-5)
