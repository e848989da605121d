"""Run files: what is read, and that everything odd is one sentence."""

import os
from pathlib import Path

import pytest

from specforge.config.load import dump_run_config, load_run_config, section_from
from specforge.errors import ConfigError
from specforge.inference.config import TargetConfig

MINIMAL = "run_dir: runs/a\ntarget: {path: target}\ndata: {path: data.jsonl}\n"


@pytest.fixture
def load(tmp_path):
    """Loads a run file with the given text."""

    def loaded(text=MINIMAL, *overrides):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_run_config(path, list(overrides))

    return loaded


@pytest.fixture
def problem(load):
    """The sentence that a run file is refused with."""

    def sentence(text=MINIMAL, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return sentence


def test_minimal_run_file_takes_defaults_and_paths_from_its_folder(load, tmp_path):
    config = load()
    assert config.run_dir == tmp_path / "runs/a"
    assert config.target.path == tmp_path / "target"
    assert config.training.lr is None
    assert config.control_plane.ledger.kind == "auto"
    assert config.algorithm.name == "eagle3"


def test_overrides_reach_any_depth_and_have_yaml_types(load, tmp_path):
    config = load(
        MINIMAL,
        "training.lr=3e-4",
        "data.limit=null",
        "algorithm.aux_layers=[1, 3, 5]",
        "data_plane.store.kind=shared_memory",
        "data_plane.store.capacity_bytes=1.5GiB",
        "control_plane.ledger.kind=sqlite",
        "control_plane.ledger.path=../a/ledger.sqlite",
        "control_plane.shuffle=false",
        "evaluation.prompts=/abs/p.jsonl",
    )
    assert config.training.lr == 3e-4
    assert config.algorithm.aux_layers == (1, 3, 5)
    assert config.data_plane.store.capacity_bytes == 3 * 2**29
    assert config.control_plane.ledger.path == tmp_path.parent / "a/ledger.sqlite"
    assert config.control_plane.shuffle is False
    assert config.evaluation.prompts == (Path("/abs/p.jsonl"),)


def test_empty_section_takes_its_defaults(load):
    assert load(MINIMAL + "training:\n", "training.lr=1").training.lr == 1.0
    assert load(MINIMAL + "training:\n").training.num_epochs == 1


@pytest.mark.parametrize(("size", "expected"), [("512MB", 512_000_000), ("64 MiB", 2**26), ("123", 123), (7, 7)])
def test_sizes_have_units(load, size, expected):
    text = f"{MINIMAL}data_plane: {{store: {{kind: shared_memory, capacity_bytes: {size}}}}}\n"
    assert load(text).data_plane.store.capacity_bytes == expected


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.learning_rate=1", "training.lr"),
        ("training.epochs=1", "training.num_epochs"),
        ("training.batch_size=1", "training.global_batch_size"),
        ("traning.lr=1", "training"),
        ("lr=1", "training.lr"),
        ("training.ttt_steps=1", "algorithm.ttt_steps"),
        ("data.max_len=1", "data.max_length"),
        ("target.model_path=1", "target.path"),
        ("control_plane.ledgr.kind=none", "control_plane.ledger"),
        ("Seed=1", "seed"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(problem, override, nearest):
    key = override.partition("=")[0]
    expected = f"unknown; did you mean {nearest}?"
    assert problem(MINIMAL, override).endswith(expected), key


def test_unknown_key_without_a_near_one_lists_what_there_is(problem):
    assert "target.zzqqxx is unknown; expected one of target.path, target.dtype" in problem(MINIMAL, "target.zzqqxx=1")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lr=fast", "training.lr should be a valid number, got 'fast'"),
        ("training.lr=-1", "training.lr should be greater than 0"),
        ("training.lr=.nan", "training.lr should be a finite number"),
        ("training.num_epochs=true", "training.num_epochs cannot be true"),
        ("training.num_epochs=1.5", "training.num_epochs should be a valid integer"),
        ("training.betas=[0.9]", "training.betas"),
        ("training.betas=[0.9, 1.5]", "training.betas[1] should be less than 1"),
        ("training=5", "training should be a section of keys, got 5"),
        (
            "training.schedule=step",
            "training.schedule should be 'cosine', 'linear', 'constant', 'inverse_sqrt' or 'wsd'",
        ),
        ("seed.x=1", "seed should be a valid integer"),
        ("seed=-1", "seed should be greater than or equal to 0"),
        ("target.path=", "target.path cannot be nothing"),
        ("target.path=''", "target.path should be a path"),
        ("target.device=gpu", "target.device cannot be 'gpu'; it is: Where the target runs: auto"),
        ("algorithm.name=eagle9", "algorithm.name should be one of eagle3, "),
        ("algorithm.block_size=8", "algorithm.block_size belongs to algorithm.name: dflash or domino or dspark"),
        ("algorithm={name: dflash, block_size: 1}", "algorithm.block_size should be greater than or equal to 2"),
        (
            "algorithm={name: dflash, layer_types: [full_attention]}",
            "algorithm: layer_types must have an entry for each",
        ),
        ("algorithm={name: medusa, ttt_steps: 3}", "algorithm.ttt_steps belongs to algorithm.name: eagle3"),
        ("data_plane.store.kind=disk", "data_plane.store.kind should be one of auto, local, shared_memory"),
        ("data_plane.store=local", "data_plane.store should be a section of keys"),
        ("data_plane.store.capacity_bytes=1GB", "belongs to data_plane.store.kind: shared_memory, but kind is auto"),
        ("seed", "should look like training.lr=3e-4"),
        ("=3", "should look like"),
        ("training..lr=3", "should look like"),
        ("run_dir.x=3", "needs run_dir to be a section"),
        ("seed=[", "cannot be read as YAML"),
        ("data_plane.store={kind: shared_memory, capacity_bytes: lots}", "capacity_bytes should be a number of bytes"),
        ("data_plane.store={kind: shared_memory, capacity_bytes: 0}", "capacity_bytes should be greater than 0"),
    ],
)
def test_wrong_value_is_one_sentence_with_its_key(problem, override, sentence):
    assert sentence in problem(MINIMAL, override)


@pytest.mark.parametrize("override", ["data_plane.store.kind=local", "control_plane.ledger.kind=none"])
def test_part_that_cannot_serve_two_processes_is_refused(problem, load, override):
    assert "topology is disaggregated but" in problem(MINIMAL, "topology=disaggregated", override)
    load(MINIMAL, override)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the run file is empty"),
        ("# nothing\n", "the run file is empty"),
        ("- a\n- b\n", "got a list"),
        ("hello\n", "got a single value"),
        ("a:\n\tb: 1\n", "line 2: cannot be read as YAML: a tab"),
        ("seed: 1\nseed: 2\n", "line 2: cannot be read as YAML: the key 'seed' is given twice"),
        ("a: &x [1]\nb: *x\n", "line 2: cannot be read as YAML: aliases"),
        ("a: &a [x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]\n", "aliases"),
        ("seed: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML: could not determine a constructor"),
        ("seed: 1\n---\nseed: 2\n", "cannot be read as YAML"),
        ("1: 2\n", "1 is unknown"),
        ("? [a]\n: 2\n", "cannot be read as YAML"),
        ("training: [\n", "cannot be read as YAML"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("seed: " + "9" * 5_000 + "\n", "cannot be read as YAML"),
        (b"seed: \xff\n", "byte 6 is not"),
        (b"seed: \x00\n", "cannot be read as YAML"),
        ("#" * (1 << 21), "at most"),
        ("run_dir: x\n", "target.path is missing; a run needs run_dir, target.path, data.path (or data.features)"),
        ("run_dir: x\ntarget:\ndata: {path: d}\n", "target.path is missing"),
        ("run_dir: x\ntarget: {}\ndata: {path: d}\n", "target.path is missing"),
    ],
)
def test_odd_yaml_is_one_sentence(problem, text, sentence):
    assert sentence in problem(text)


def test_byte_order_mark_is_no_problem(load):
    assert load(b"\xef\xbb\xbf" + MINIMAL.encode()).seed == 0


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_run_file_that_cannot_be_read_is_one_sentence(tmp_path, name):
    with pytest.raises(ConfigError, match=r"no such run file|is a directory"):
        load_run_config(tmp_path / name)


def test_home_directory_is_understood(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(load(MINIMAL, "target.path=~/m").target.path) == "/home/someone/m"


def test_resolved_configuration_reads_back_as_the_same_run(load, tmp_path):
    config = load(MINIMAL, "data_plane.store={kind: shared_memory, capacity_bytes: 1GB}", "algorithm.aux_layers=[1,2]")
    path = tmp_path / "elsewhere" / "run.yaml"
    path.parent.mkdir()
    dump_run_config(config, path)
    dump_run_config(config, path)
    assert load_run_config(path) == config
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["run.yaml"]  # noqa: PTH208 - hidden files too


def test_section_by_itself_has_the_same_sentences(tmp_path):
    assert section_from(TargetConfig, "target", {"path": "a"}, tmp_path).path == tmp_path / "a"
    with pytest.raises(ConfigError, match=r"^target\.device cannot be 'gpu'"):
        section_from(TargetConfig, "target", {"path": "a", "device": "gpu"}, tmp_path)
    with pytest.raises(ConfigError, match=r"^target\.pth is unknown; did you mean target\.path\?"):
        section_from(TargetConfig, "target", {"pth": "a"}, tmp_path)
