import errno
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from specforge.contracts.features import ALIGNMENT, FeatureSpec
from specforge.data_plane import safetensors_file
from specforge.data_plane.safetensors_file import checksum, is_leftover, map_file, read_header, write_file
from specforge.data_plane.tensors import DTYPES, Columns, specs_of, views
from specforge.errors import CorruptFeature, FeatureStoreError
from specforge.testing.feature_store import assert_same_bits

METADATA = {"sample_id": 'ü "quoted"', "generation": "3"}


def write(path, sources, *, fsync=False):
    specs, num_bytes = specs_of(sources)
    return write_file(path, specs, num_bytes, sources, METADATA, fsync=fsync)


def read(path):
    buffer, header = map_file(path)
    return views(buffer, header.specs)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def encoded(fields, num_data_bytes=0):
    """A file with this header, padded as ours are."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
    return len(text).to_bytes(8, "little") + text + bytes(num_data_bytes)


def entry(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize("fsync", [False, True])
def test_public_library_reads_what_was_written(path, fsync):
    sources = {name: torch.ones(3, 5).to(dtype) for name, dtype in DTYPES.items()}
    sources |= {"one": torch.tensor(2.5), "none": torch.empty(0, 3), "even": torch.ones(16), "end": torch.empty(0)}
    write(path, sources, fsync=fsync)
    public = load_file(path)
    assert {name for name in public if not name.startswith("__pad")} == set(sources)
    assert_same_bits({name: public[name] for name in sources}, sources)
    assert_same_bits(read(path), sources)
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA


def test_layout_is_the_contracts_and_aligned_in_file_and_memory(path):
    sources = {"x": torch.ones(3), "none": torch.empty(0), "y": torch.ones(2, 2, dtype=torch.int64)}
    specs, num_bytes = specs_of(sources)
    write(path, sources)
    header = read_header(path)
    assert (header.specs, header.num_bytes, header.metadata) == (specs, num_bytes, METADATA)
    assert header.data_offset % ALIGNMENT == 0
    assert path.stat().st_size == header.data_offset + num_bytes
    buffer, mapped = map_file(path)
    assert mapped == header
    assert buffer.data_ptr() % ALIGNMENT == 0
    assert len(buffer) == num_bytes


def test_sample_of_no_bytes_and_sample_of_no_features(path):
    for sources in ({"x": torch.empty(0, 3, dtype=torch.bfloat16)}, {}):
        write(path, sources)
        assert_same_bits(read(path), sources)
        assert checksum(path) == 0
        assert load_file(path).keys() == sources.keys()


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1000, 1 << 20])
def test_what_is_copied_in_pieces_has_the_same_bits(path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", chunk_bytes)
    parts = (torch.randn(50, 6), torch.randn(7, 50).t())
    plain = {
        "transposed": torch.randn(13, 50).t(),
        "strided": torch.randn(40, 8)[::3, 1:7:2],
        "expanded": torch.randn(1).expand(77),
        "negated": torch.complex(torch.randn(9), torch.randn(9)).conj().imag,
    }
    write(path, plain | {"joined": Columns(parts, "bfloat16")})
    assert_same_bits(read(path), plain | {"joined": torch.cat(parts, dim=1).to(torch.bfloat16)})


def test_checksum_is_of_the_data_and_sees_one_bit(path, tmp_path):
    crc = write(path, {"x": torch.arange(5000), "y": Columns((torch.ones(7, 3),), "bfloat16")})
    assert checksum(path) == crc
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert checksum(path) != crc


def test_file_is_private_and_replaces_an_older_one(path, tmp_path):
    write(path, {"x": torch.ones(3)})
    old = read(path)
    write(path, {"x": torch.zeros(5)})
    assert_same_bits(old, {"x": torch.ones(3)})
    assert_same_bits(read(path), {"x": torch.zeros(5)})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_mapping_outlives_the_name_and_is_private(path):
    write(path, {"x": torch.ones(3)})
    first, second = read(path), read(path)
    path.unlink()
    first["x"].zero_()
    assert_same_bits(second, {"x": torch.ones(3)})


def test_failure_leaves_no_file(path, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError):
        write(path, {"x": Columns((torch.ones(4, 2), torch.ones(3, 2)), "float32")})

    def fails(*_):
        raise OSError(errno.EIO, "rename")

    monkeypatch.setattr(type(path), "replace", fails)
    with pytest.raises(OSError, match="rename"):
        write(path, {"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_name_of_the_format_is_refused(path, tmp_path):
    for name in ("__metadata__", "__pad0"):
        with pytest.raises(FeatureStoreError, match=name):
            write(path, {name: torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_said_as_such(path):
    for reading in (read_header, map_file, checksum):
        with pytest.raises(FileNotFoundError):
            reading(path)


def test_file_cut_anywhere_is_corrupt(path):
    write(path, {"x": torch.ones(30), "y": torch.ones(3)})
    whole = path.read_bytes()
    for length in [*range(0, 100, 7), len(whole) - 200, len(whole) - 64, len(whole) - 1]:
        path.write_bytes(whole[:length])
        for reading in (read_header, map_file, checksum):
            with pytest.raises(CorruptFeature, match=str(path)):
                reading(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptFeature, match=f"it has {len(whole) + 1} bytes, its header describes {len(whole)}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0"),
        (bytes(4096), "no multiple of 64"),
        (b"\xff" * 4096, "does not fit"),
        (encoded(b"\xff\xfe{"), "not JSON"),
        (encoded(b"{"), "not JSON"),
        (encoded(b"[" * 100_000), "not JSON"),
        (encoded(b'{"x": ' + b"9" * 5000 + b"}"), "not JSON"),
        (encoded([]), "no JSON object"),
        (encoded({"__metadata__": []}), "metadata"),
        (encoded({"__metadata__": {"a": 1}}), "metadata"),
        (encoded({"x": None}), "tensor 'x'"),
        (encoded({"x": entry(dtype="F64")}, 4), "tensor 'x'"),
        (encoded({"x": entry(dtype=["F32"])}, 4), "tensor 'x'"),
        (encoded({"x": entry(shape=(-1,))}, 4), "tensor 'x'"),
        (encoded({"x": entry(shape=(1.0,))}, 4), "tensor 'x'"),
        (encoded({"x": entry(shape=(2,))}, 4), "tensor 'x'"),
        (encoded({"x": entry(shape=(1 << 62, 1 << 62))}, 4), "tensor 'x'"),
        (encoded({"x": entry(-4, 0)}, 4), "starts at byte -4"),
        (encoded({"x": entry(0, -4, (-1,))}, 4), "tensor 'x'"),
        (encoded({"x": entry(4, 8)}, 8), "starts at byte 4 of the data, expected 0"),
        (encoded({"x": entry(), "y": entry()}, 4), "starts at byte 0 of the data, expected 4"),
        (encoded({"x": entry(), "y": entry(4, 8)}, 8), "no multiple of 64"),
        (encoded({"x": entry()}, 3), "describes"),
        (encoded({"x": entry()}, 5), "describes"),
    ],
)
def test_garbage_is_corrupt_with_name_and_reason(path, content, reason):
    path.write_bytes(content)
    for reading in (read_header, map_file):
        with pytest.raises(CorruptFeature, match=reason) as caught:
            reading(path)
        assert str(path) in str(caught.value)


def test_file_that_shrinks_while_it_is_mapped_is_corrupt(path, monkeypatch):
    write(path, {"x": torch.ones(3)})
    from_file = torch.from_file

    def shrunk(*arguments, **options):
        os.truncate(path, 10)
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", shrunk)
    with pytest.raises(CorruptFeature, match="shorter"):
        map_file(path)


def test_file_that_goes_while_it_is_mapped_is_missing(path, monkeypatch):
    write(path, {"x": torch.ones(3)})
    from_file = torch.from_file

    def gone(*arguments, **options):
        path.unlink()
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", gone)
    with pytest.raises(FileNotFoundError):
        map_file(path)


def test_large_header_is_padded_like_a_small_one(path):
    sources = {f"feature {index}": torch.full((index,), index) for index in range(200)}
    write(path, sources)
    assert_same_bits(read(path), sources)
    assert read_header(path).specs[1] == FeatureSpec("feature 1", "int64", (1,), 0)


@pytest.mark.parametrize("name", ["a.safetensors", ".x.tmp", ".tmp", ".a.b.c.tmp", "..tmp", ".1-2-3.1.tmp"])
def test_other_names_are_no_leftovers(name):
    assert not is_leftover(name)
