import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specforge.contracts.capture import CaptureSpec
from specforge.data_plane.offline import (
    FailedSample,
    FeatureSet,
    Manifest,
    StoredSample,
    check_files,
    check_prompts,
    check_same_capture,
    sample_path,
)
from specforge.data_plane.offline_writer import FeatureSetWriter
from specforge.errors import CorruptFeature, DataError

SPEC = CaptureSpec((1, 3), last_hidden=True, dtype="bfloat16")
PROMPTS = b'{"input_ids":[1,2],"loss_spans":[[0,2]]}\n'
NAMES = [f"{number:08d}-abcdef" for number in range(6)]
MANIFEST = Manifest("a" * 64, "models/t", "float32", SPEC, SPEC.fingerprint, 8, "", 0)


def manifest(**changes: object) -> Manifest:
    spec = changes.get("spec", SPEC)
    fields = {name: getattr(MANIFEST, name) for name in MANIFEST.__slots__}
    return Manifest(**{**fields, "fingerprint": spec.fingerprint, **changes})


def features(name: str) -> dict[str, torch.Tensor]:
    number = int(name[:8])
    draw = torch.Generator().manual_seed(number)
    tokens = 3 + number
    return {
        "input_ids": torch.arange(tokens, dtype=torch.int32),
        "aux": torch.randn(tokens, 16, generator=draw).bfloat16(),
        "last": torch.randn(tokens, 8, generator=draw).bfloat16(),
    }


def opened(directory: Path, prompts: bytes = PROMPTS, **changes: object) -> FeatureSetWriter:
    return FeatureSetWriter(directory, manifest(**changes), prompts, NAMES)


def add(writer: FeatureSetWriter, names: Sequence[str]) -> None:
    for name in names:
        writer.add(name, 3 + int(name[:8]), ((1, 3),), features(name))


def write(directory: Path, failed: Sequence[str] = ()) -> Path:
    """A complete set; samples in ``failed`` have a reason in place of features."""
    writer = opened(directory)
    add(writer, [name for name in writer.missing() if name not in failed])
    for name in failed:
        writer.fail(name, "odd prompt")
    writer.finish()
    writer.close()
    return directory


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_entry(directory: Path, number: int, **changes: object) -> None:
    path = directory / "index.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    path.write_text("\n".join(lines) + "\n")


def verify(directory: Path, checksums: bool = True) -> None:
    found = FeatureSet(directory)
    check_prompts(directory, found.manifest)
    check_files(directory, found.entries.values(), checksums=checksums)


def test_what_was_written_is_read_back_with_the_same_bits(tmp_path):
    found = FeatureSet(write(tmp_path / "set"))
    assert list(found.entries) == NAMES
    for name in NAMES:
        read = found.read(name)
        assert list(read) == ["input_ids", "aux", "last"]
        assert all(torch.equal(read[key], tensor) for key, tensor in features(name).items())
        assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())
    entry = found.entries[NAMES[2]]
    assert isinstance(entry, StoredSample)
    assert (entry.generation, entry.num_tokens, entry.loss_spans) == (1, 5, ((1, 3),))
    assert found.manifest.num_captured == found.manifest.num_prompts == 6
    assert found.manifest.total_bytes == sum(e.num_bytes for e in found.entries.values() if isinstance(e, StoredSample))
    verify(tmp_path / "set")


def test_the_public_library_loads_a_file(tmp_path):
    directory = write(tmp_path / "set")
    loaded = load_file(directory / sample_path(NAMES[3]))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in features(NAMES[3]).items())


def test_reading_holds_no_descriptor_and_what_is_written_to_a_tensor_stays_in_memory(tmp_path):
    directory = write(tmp_path / "set")
    before, found = content(directory), FeatureSet(directory)
    num_open = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    read = [found.read(name) for name in NAMES]
    assert len(os.listdir("/proc/self/fd")) == num_open  # noqa: PTH208
    read[0]["aux"].zero_()
    assert content(directory) == before


def test_only_the_owner_may_read_a_set(tmp_path):
    directory = write(tmp_path / "set")
    for path in [directory, *directory.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("torn", [b"", b'{"sample_id":"0000', b'{"sample_id":"0000\n', b"\0\0\0\n"])
def test_an_interrupted_writer_is_gone_on_with_to_the_same_bytes(tmp_path, torn):
    undisturbed = content(write(tmp_path / "undisturbed"))
    directory = tmp_path / "set"
    writer = opened(directory)
    add(writer, [NAMES[4], *NAMES[:2]])
    writer.close()
    with (directory / "index.jsonl").open("ab") as index:
        index.write(torn)
    again = opened(directory)
    assert again.missing() == [NAMES[2], NAMES[3], NAMES[5]]
    add(again, again.missing())
    again.finish()
    again.close()
    assert content(directory) == undisturbed


def test_a_complete_set_is_not_touched_by_another_capture(tmp_path):
    directory = write(tmp_path / "set")
    times = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    writer = opened(directory)
    assert writer.missing() == []
    writer.finish()
    writer.close()
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == times


def test_a_file_that_is_gone_or_cut_and_a_sample_that_failed_are_captured_again(tmp_path):
    directory = write(tmp_path / "set", failed=[NAMES[5]])
    (directory / sample_path(NAMES[0])).unlink()
    os.truncate(directory / sample_path(NAMES[1]), 200)
    writer = opened(directory)
    assert writer.missing() == [NAMES[0], NAMES[1], NAMES[5]]
    add(writer, writer.missing()[:1])
    with pytest.raises(DataError, match="did not finish"):
        FeatureSet(directory)
    add(writer, writer.missing())
    writer.finish()
    writer.close()
    assert content(directory) == content(write(tmp_path / "undisturbed"))


def test_a_sample_that_fails_now_leaves_no_file_of_an_earlier_attempt(tmp_path):
    directory = tmp_path / "set"
    writer = opened(directory)
    add(writer, NAMES)
    writer.close()
    lines = (directory / "index.jsonl").read_text().splitlines(keepends=True)
    (directory / "index.jsonl").write_text("".join(lines[1:]))
    again = opened(directory)
    again.fail(NAMES[0], "odd prompt")
    again.finish()
    again.close()
    assert content(directory) == content(write(tmp_path / "other", failed=[NAMES[0]]))


def test_temporary_files_of_earlier_writers_are_removed(tmp_path):
    directory = write(tmp_path / "set")
    folder = next((directory / "features").iterdir())
    (folder / ".of-another-boot.1.tmp").touch()
    opened(directory).close()
    assert list(folder.glob(".*")) == []


def test_a_complete_set_with_a_failure_stays_complete_until_something_is_added(tmp_path):
    directory = write(tmp_path / "set", failed=[NAMES[0]])
    before = content(directory)
    opened(directory).close()
    assert content(directory) == before


def test_a_capture_that_ended_before_its_manifest_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(FeatureSetWriter, "_write", full)
        with pytest.raises(OSError, match="No space"):
            opened(tmp_path / "set")
    assert content(write(tmp_path / "set")) == content(write(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "complaints"),
    [
        ({"target_revision": "b" * 64}, ["target revision aaaa", "now bbbb", "target.path"]),
        ({"target_dtype": "bfloat16"}, ["computes in float32, now bfloat16", "target.dtype"]),
        ({"prompts": b"other"}, ["prompts", "data"]),
        ({"spec": CaptureSpec((1, 2), True, "bfloat16")}, ["aux_layers = [1, 3], now [1, 2]", "algorithm.aux_layers"]),
        ({"spec": CaptureSpec((1, 3), True, "float32")}, ["dtype = bfloat16, now float32", "data_plane.capture_dtype"]),
    ],
)
def test_a_set_of_another_capture_is_not_gone_on_with(tmp_path, changes, complaints):
    before = content(write(tmp_path / "set"))
    with pytest.raises(DataError) as refused:
        opened(tmp_path / "set", **changes)
    assert all(complaint in str(refused.value) for complaint in complaints), refused.value
    assert content(tmp_path / "set") == before


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"holds 'thesis\.tex' and no manifest\.json"):
        opened(tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"x"}


def test_a_failed_sample_is_raised_with_its_reason(tmp_path):
    found = FeatureSet(write(tmp_path / "set", failed=[NAMES[1]]))
    assert found.entries[NAMES[1]] == FailedSample(NAMES[1], "odd prompt")
    assert (found.manifest.num_captured, found.manifest.num_failed) == (5, 1)
    with pytest.raises(DataError, match=f"{NAMES[1]}.*could not be captured: odd prompt"):
        found.read(NAMES[1])
    with pytest.raises(DataError, match="has no sample 'other'"):
        found.read("other")
    verify(tmp_path / "set")


def test_a_set_without_manifest_or_unfinished_or_of_another_version_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none/manifest\.json is missing.*specforge capture --to"):
        FeatureSet(tmp_path / "none")
    opened(tmp_path / "begun").close()
    with pytest.raises(DataError, match=r"begun/manifest\.json: capture did not finish; run specforge capture again"):
        FeatureSet(tmp_path / "begun")
    directory = write(tmp_path / "set")
    edit_manifest(directory, format_version=2)
    with pytest.raises(DataError, match=r"manifest\.json has format version 2, this build reads 1"):
        FeatureSet(directory)
    edit_manifest(directory, format_version=1, fingerprint="0" * 16)
    with pytest.raises(DataError, match=r"manifest\.json is damaged \(its fingerprint"):
        FeatureSet(directory)
    (directory / "manifest.json").write_text('{"format_version": 1, "rev')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        FeatureSet(directory)


def test_features_of_another_target_or_capture_are_refused(tmp_path):
    directory = write(tmp_path / "set")
    found = FeatureSet(directory).manifest
    check_same_capture(directory, found, ("models/t", "a" * 64), SPEC)
    with pytest.raises(
        DataError, match=r"manifest\.json: captured from revision aaaaaaaaaaaa, the target at here has bb"
    ):
        check_same_capture(directory, found, ("here", "b" * 64), SPEC)
    for spec, option in (
        (CaptureSpec((1, 2), True, "bfloat16"), r"set algorithm\.aux_layers to \[1, 3\]"),
        (CaptureSpec((1, 3), True, "float32"), r"set data_plane\.capture_dtype to bfloat16"),
        (CaptureSpec((1, 3), False, "bfloat16"), "last_hidden = True, but this run wants False"),
    ):
        with pytest.raises(DataError, match=rf"manifest\.json: captured with .*{option}"):
            check_same_capture(directory, found, ("models/t", "a" * 64), spec)


def test_prompts_that_changed_are_refused(tmp_path):
    directory = write(tmp_path / "set")
    (directory / "prompts.jsonl").write_bytes(PROMPTS * 2)
    with pytest.raises(DataError, match=r"prompts\.jsonl changed since the capture"):
        verify(directory)
    (directory / "prompts.jsonl").unlink()
    with pytest.raises(DataError, match=r"prompts\.jsonl cannot be read"):
        verify(directory)


def test_an_index_that_is_damaged_or_incomplete_is_refused(tmp_path):
    directory = write(tmp_path / "set")
    whole = (directory / "index.jsonl").read_text()
    (directory / "index.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"index\.jsonl: 5 samples, .* are listed, but manifest\.json says 6"):
        FeatureSet(directory)
    (directory / "index.jsonl").write_text(whole[:-20])
    with pytest.raises(DataError, match=r"index\.jsonl line 6 is damaged"):
        FeatureSet(directory)
    (directory / "index.jsonl").write_text(whole.replace('"crc32":', '"crc":', 1))
    with pytest.raises(DataError, match=r"index\.jsonl line 1 is damaged"):
        opened(directory)
    (directory / "index.jsonl").unlink()
    with pytest.raises(DataError, match=r"index\.jsonl is missing"):
        FeatureSet(directory)


@pytest.mark.parametrize("path", ["../a.safetensors", "/etc/a.safetensors", "features/../../a.safetensors", "features"])
def test_an_index_cannot_name_a_file_outside_the_set(tmp_path, path):
    directory = write(tmp_path / "set")
    edit_entry(directory, 0, path=path)
    with pytest.raises(DataError, match=r"index\.jsonl line 1 is damaged .*is no place of a feature file"):
        FeatureSet(directory)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (Path.unlink, "is missing; run specforge capture again"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "is no whole feature file: it has"),
        (lambda path: os.truncate(path, 3), "is no whole feature file"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is no whole feature file: it has"),
        (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "is no whole feature file: a header of"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtipe"')), "is described as"),
        (
            lambda path: path.write_bytes(path.with_name("other").read_bytes()),
            "the index says .* of input_ids, aux, last in other shapes",
        ),
    ],
)
def test_a_damaged_file_is_named_before_training(tmp_path, checksums, damage, complaint):
    directory = write(tmp_path / "set")
    path = directory / sample_path(NAMES[4])
    path.with_name("other").write_bytes((directory / sample_path(NAMES[1])).read_bytes())
    damage(path)
    with pytest.raises(DataError, match=f"{path}.*{complaint}"):
        verify(directory, checksums)
    with pytest.raises((CorruptFeature, FileNotFoundError), match=path.name):
        FeatureSet(directory).read(NAMES[4])


def test_one_flipped_bit_is_found_by_the_checksum_alone(tmp_path):
    directory = write(tmp_path / "set")
    path = directory / sample_path(NAMES[4])
    damaged = bytearray(path.read_bytes())
    damaged[-70] ^= 1
    path.write_bytes(damaged)
    verify(directory, checksums=False)
    with pytest.raises(DataError, match=f"{path} was damaged after the capture: its data has the crc32"):
        verify(directory)


def test_files_are_named_after_their_samples_and_stay_in_the_set():
    assert sample_path(NAMES[0]).endswith(f"/{NAMES[0]}.safetensors")
    odd = ["", "..", ".hidden", "a/b", "é", "x" * 300]
    places = [sample_path(name) for name in odd]
    assert len(set(places)) == len(odd)
    for place in places:
        assert len(place.split("/")) == 3
        assert place.split("/")[0] == "features"
        assert len(place.split("/")[2]) < 100
