import pytest
import torch

from specforge.data_plane.encoding import CHUNK_ELEMENTS, FLOAT8_MAX, decode, encode, encoded, not_finite
from specforge.data_plane.tensors import Columns, materialised

FLOAT8 = "float8_e4m3fn"


def hidden_states(num_tokens=37, width=64, num_layers=3, seed=0):
    """Residual streams as real targets have them: small values, and channels that are thousands of times larger."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for number in range(num_layers):
        spread = torch.exp(2 * torch.randn(num_tokens, 1, generator=generator))
        layer = torch.randn(num_tokens, width, generator=generator) * spread * 10.0**number
        layer[:, 5] *= 3000
        layer[3] *= 1e-12
        layers.append(layer)
    return layers


def decoded(values, scales, dtype=torch.float32):
    target = torch.empty(values.shape, dtype=dtype)
    decode(values, scales, target)
    return target


def test_float8_has_one_scale_a_token_and_layer_and_its_largest_value_is_448():
    layers = hidden_states()
    values, scales = encode(layers)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, (37, 192))
    assert (scales.dtype, scales.shape) == (torch.float32, (37, 3))
    for number, layer in enumerate(layers):
        assert torch.equal(scales[:, number], layer.abs().amax(1) / 448)
    assert torch.equal(values.float().abs().unflatten(1, (3, 64)).amax(2), torch.full((37, 3), FLOAT8_MAX))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_within_the_stated_bound(dtype):
    layers = [layer.to(dtype) for layer in hidden_states(num_layers=2)]
    values, scales = encode(layers)
    true = torch.cat(layers, dim=1).double()
    scale = scales.double().repeat_interleave(64, dim=1)
    bound = torch.maximum(true.abs() * 2.0**-4, scale * 2.0**-10)
    wide = decoded(values, scales).double()
    assert ((wide - true).abs() <= bound * (1 + 2.0**-20)).all()
    rounded = decoded(values, scales, torch.bfloat16).double()
    assert ((rounded - true).abs() <= bound * (1 + 2.0**-20) + 2.0**-8 * wide.abs()).all()
    # without the rows' own scales the small token would be gone
    assert wide[3].abs().max() > 0


def test_decoding_is_the_product_of_value_and_scale():
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    values = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 127)
    scales = torch.tensor([[3.7], [1e-30]])
    assert torch.equal(decoded(values, scales), values.float() * scales)
    assert torch.equal(decoded(values, scales, torch.bfloat16), (values.float() * scales).bfloat16())


def test_every_exact_value_keeps_its_bits():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    row = torch.cat([codes.float(), -codes.float()])[None] * 2.0**-9
    values, scales = encode([row])
    assert scales.item() == 2.0**-9
    assert torch.equal(decoded(values, scales), row)


@pytest.mark.parametrize("tiny", [0.0, 1e-44, 1e-37])
def test_rows_of_zeros_have_the_scale_one(tiny):
    layer = torch.ones(3, 8)
    layer[1] = tiny
    values, scales = encode([layer])
    assert scales[1] == 1
    assert torch.equal(decoded(values, scales)[1], torch.zeros(8))
    assert torch.equal(decoded(values, scales)[::2], layer[::2])


def test_a_row_is_encoded_alike_whatever_stands_beside_it():
    width = 4096
    num_tokens = 2 * CHUNK_ELEMENTS // width + 3
    layers = hidden_states(num_tokens, width, num_layers=2)
    values, scales = encode(layers)
    for token in (0, CHUNK_ELEMENTS // width, num_tokens - 1):
        alone, its_scales = encode([layer[token : token + 1] for layer in layers])
        assert torch.equal(values[token : token + 1].view(torch.uint8), alone.view(torch.uint8))
        assert torch.equal(scales[token : token + 1], its_scales)
    together = decoded(values, scales)
    assert torch.equal(together[-2:], decoded(values[-2:], scales[-2:]))


def test_samples_without_tokens_are_encoded_and_decoded():
    values, scales = encode([torch.empty(0, 8), torch.empty(0, 8)])
    assert (values.shape, scales.shape) == ((0, 16), (0, 2))
    assert decoded(values, scales).shape == (0, 16)
    assert not_finite(encoded("aux", [torch.empty(0, 8)], "bfloat16")) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_is_joined_or_cast_before_the_put(dtype):
    layers = hidden_states(num_layers=2)
    [(name, source)] = encoded("aux", layers, dtype).items()
    assert name == "aux"
    assert isinstance(source, Columns)
    assert all(part is layer for part, layer in zip(source.parts, layers, strict=True))
    assert torch.equal(materialised(source), torch.cat(layers, dim=1).to(getattr(torch, dtype)))


def test_one_layer_of_the_right_dtype_stays_the_tensor_it_is():
    [layer] = hidden_states(num_layers=1)
    assert encoded("last", [layer], "float32")["last"] is layer
    assert isinstance(encoded("last", [layer], "bfloat16")["last"], Columns)
    assert set(encoded("last", [layer], FLOAT8)) == {"last", "last_scale"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", FLOAT8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_damage_is_found_in_every_format(dtype, bad):
    layers = hidden_states()
    assert not_finite(encoded("aux", layers, dtype)) is None
    layers[1][36, 63] = bad
    sources = {"input_ids": torch.ones(37, dtype=torch.int32), **encoded("last", layers[:1], dtype)}
    assert not_finite(sources) is None
    assert not_finite(sources | encoded("aux", layers, dtype)) == "aux"


def test_a_value_that_the_cast_would_make_infinite_is_damage():
    layer = torch.full((2, 4), 1.0)
    layer[1, 2] = 3.4e38
    assert not_finite(encoded("last", [layer], "float32")) is None
    assert not_finite(encoded("last", [layer], "bfloat16")) == "last"
