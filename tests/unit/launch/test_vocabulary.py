import json

import pytest
import torch
from safetensors.torch import load_file

from specforge.config.load import run_config_from
from specforge.contracts.tasks import PromptTask
from specforge.errors import ConfigError, DataError
from specforge.launch import vocabulary
from specforge.launch.inputs import read_run_inputs
from specforge.launch.vocabulary import cached_vocabulary, draft_vocabulary, tokenizer_sha256
from specforge.prompts.vocabulary import count_loss_tokens

FACTS = {"vocab_size": 12, "draft_vocab_size": 4, "data_sha256": "d", "target_revision": "t", "tokenizer_sha256": "s"}
KEPT = torch.tensor([1, 3, 4, 7])


class Counter:
    """Gives the kept ids and knows how often it was asked."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return KEPT


def test_the_second_run_reads_what_the_first_counted(tmp_path):
    counter = Counter()
    for _ in range(3):
        assert torch.equal(cached_vocabulary(tmp_path, FACTS, counter), KEPT)
    assert counter.calls == 1
    [file] = tmp_path.iterdir()
    maps = load_file(file)
    assert maps["d2t"].tolist() == [1, 2, 2, 4]
    assert maps["t2d"].nonzero().flatten().tolist() == KEPT.tolist()


@pytest.mark.parametrize("key", list(FACTS))
def test_everything_that_it_depends_on_has_a_file_of_its_own(tmp_path, key):
    counter = Counter()
    cached_vocabulary(tmp_path, FACTS, counter)
    cached_vocabulary(tmp_path, FACTS | {key: 11 if isinstance(FACTS[key], int) else "x"}, counter)
    assert counter.calls == 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "foreign"])
def test_a_damaged_file_is_made_again(tmp_path, damage, caplog):
    counter = Counter()
    cached_vocabulary(tmp_path, FACTS, counter)
    [file] = tmp_path.iterdir()
    good = file.read_bytes()
    other = tmp_path / "other"
    cached_vocabulary(other, FACTS | {"target_revision": "u"}, Counter())
    file.write_bytes(
        {
            "empty": b"",
            "torn": good[: len(good) // 2],
            "flipped": good[:-1] + bytes([good[-1] ^ 1]),
            "foreign": next(other.iterdir()).read_bytes(),
        }[damage]
    )
    assert torch.equal(cached_vocabulary(tmp_path, FACTS, counter), KEPT)
    assert counter.calls == 2
    assert "damaged and made again" in caplog.text
    assert torch.equal(cached_vocabulary(tmp_path, FACTS, counter), KEPT)
    assert counter.calls == 2


def test_a_kill_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def killed(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(vocabulary.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_vocabulary(tmp_path, FACTS, Counter())
    assert list(tmp_path.glob("[!.]*")) == []
    assert torch.equal(cached_vocabulary(tmp_path, FACTS, Counter()), KEPT)


def run_inputs(directory, target, rows, **overrides):
    data = directory / "tokens.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "run_dir": str(directory / "run"),
        "target": {"path": str(target), "device": "cpu"},
        "data": {"path": str(data), **overrides},
        "algorithm": {"draft_vocab_size": 5},
    }
    return read_run_inputs(run_config_from(content, directory))


ROWS = [{"input_ids": [9, 9, 9, 5, 7, 7, 20, 5], "loss_spans": [[3, 8]]}]


def test_the_vocabulary_of_a_run_is_the_most_frequent_tokens_under_its_loss(tmp_path, tiny_target_dir, monkeypatch):
    inputs = run_inputs(tmp_path, tiny_target_dir, ROWS)
    kept = draft_vocabulary(inputs)
    assert kept.tolist() == [0, 1, 5, 7, 20]
    assert kept.device.type == "cpu"
    [file] = (tmp_path / "run" / "vocabulary").iterdir()
    monkeypatch.setattr(vocabulary, "count_loss_tokens", None)  # a resumed run does not count
    assert torch.equal(draft_vocabulary(inputs), kept)
    assert file.suffix == ".safetensors"


def test_runs_can_share_a_cache(tmp_path, tiny_target_dir):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "ab":
        draft_vocabulary(run_inputs(tmp_path / name, tiny_target_dir, ROWS, vocabulary_cache=str(tmp_path / "cache")))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_cache_that_is_a_file_is_refused_before_anything_is_counted(tmp_path, tiny_target_dir, monkeypatch, below):
    monkeypatch.setattr(vocabulary, "count_loss_tokens", None)
    file = tmp_path / "cache"
    file.touch()
    inputs = run_inputs(tmp_path, tiny_target_dir, ROWS, vocabulary_cache=str(file / below))
    with pytest.raises(ConfigError, match=r"data\.vocabulary_cache is .*cache is a file; give a directory"):
        draft_vocabulary(inputs)


def test_ids_that_the_tokenizer_does_not_know_are_refused_with_what_to_do():
    task = PromptTask(0, "a", (1, 6), ((0, 2),))
    assert count_loss_tokens([task], 8, 7)[6] == 1
    with pytest.raises(DataError, match=r"token id 6, the target's tokenizer knows 6 ids; .* tokenize the samples"):
        count_loss_tokens([task], 8, 6)
    with pytest.raises(DataError, match="token id 6, the target knows 5 ids"):
        count_loss_tokens([task], 5, 6)


def test_a_vocabulary_larger_than_the_tokenizers_is_refused(tmp_path, tiny_target_dir, monkeypatch):
    inputs = run_inputs(tmp_path, tiny_target_dir, ROWS)
    monkeypatch.setattr(vocabulary, "load_tokenizer", lambda path, trust: range(4))
    with pytest.raises(ConfigError, match=r"draft_vocab_size is 5, but the tokenizer of .* knows 4 ids"):
        draft_vocabulary(inputs)


def test_tokenizer_is_known_by_its_files(tmp_path):
    assert tokenizer_sha256(tmp_path) == ""
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer_sha256(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert len({first, tokenizer_sha256(tmp_path), ""}) == 3
