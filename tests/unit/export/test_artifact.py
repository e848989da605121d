"""Where an export is written, and what stays there when it cannot be."""

import os
from pathlib import Path

import pytest
from export_drafts import TARGET, exported, trained

from specforge.errors import DraftError
from specforge.export import artifact
from specforge.export.draft import FORMATS, read_export, write_export


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refuse(directory: Path) -> None:
    assert sorted(files(directory)) == ["README.md", "config.json", "model.safetensors"]
    raise DraftError(f"{directory} does not give the logits")


def test_earlier_export_survives_one_that_fails_its_check(tmp_path: Path):
    out = tmp_path / "out"
    exported(trained("eagle3"), out)
    before = files(out)
    with pytest.raises(DraftError, match=rf"^{out} does not give the logits"):
        write_export(trained("eagle3", seed=4), TARGET, FORMATS["sglang"], out, verify=refuse)
    assert files(out) == before
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(DraftError, match="does not give the logits"):
        write_export(trained("eagle3"), TARGET, FORMATS["sglang"], tmp_path / "new", verify=refuse)
    assert list(tmp_path.iterdir()) == [out]


def test_link_leads_to_what_is_written(tmp_path: Path):
    (tmp_path / "link").symlink_to("there/draft")
    for algorithm in ("eagle3", "dflash"):
        exported(trained(algorithm), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert read_export(tmp_path / "there/draft").options["name"] == algorithm
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_places_that_cannot_be_replaced_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    record = trained("eagle3")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for out, message in (
        (".", "is the directory that this command runs in"),
        ("..", "is the directory that this command runs in"),
        ("/proc", "is a mount point"),
        ("loop", "loop cannot be made"),
        ("file", "is a file"),
        ("file/out", "file/out cannot be made"),
    ):
        with pytest.raises(DraftError, match=message):
            write_export(record, TARGET, FORMATS["sglang"], Path(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_export_that_cannot_be_put_in_its_place_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, rename = tmp_path / "out", Path.rename
    exported(trained("eagle3"), out)
    before = files(out)

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(16, os.strerror(16))
        return rename(self, target)

    monkeypatch.setattr(artifact.Path, "rename", fail)
    with pytest.raises(DraftError, match=r"out cannot be written .*busy.* what was there is still there"):
        exported(trained("eagle3", seed=4), out)
    assert files(out) == before
    assert list(tmp_path.iterdir()) == [out]
