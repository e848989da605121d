import pytest

from specforge.algorithms.catalog import ALGORITHMS
from specforge.demo.corpus import Module, standard_library_modules
from specforge.demo.prompts import cut_prompts
from specforge.demo.run import (
    DRAFTS,
    PACKAGED_TARGET,
    Demo,
    DemoOptions,
    DemoRecipe,
    Phases,
    open_demo,
    refuse_foreign,
    run_demo,
    trained_modules,
)
from specforge.errors import DataError, UserError
from specforge.inference.target import load_tokenizer, read_target_info
from specforge.launch.lock import run_lock


def test_prompts_are_a_function_of_modules_and_key_and_never_repeat():
    tokenizer = load_tokenizer(PACKAGED_TARGET)
    modules = [module for module in standard_library_modules() if module.held_out][:10]
    first = cut_prompts(modules, tokenizer, 20, 16, "a")
    assert first == cut_prompts(modules, tokenizer, 20, 16, "a")
    assert first != cut_prompts(modules, tokenizer, 20, 16, "b")
    assert len({prompt.input_ids for prompt in first}) == 20
    assert all(len(prompt.input_ids) == 16 for prompt in first)


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="long enough"):
        cut_prompts([Module("m", "x" * 10)], load_tokenizer(PACKAGED_TARGET), 1, 16, "a")


def test_the_packaged_target_was_trained_on_no_held_out_module():
    names = trained_modules(PACKAGED_TARGET)
    held_out = [module.name for module in standard_library_modules() if module.held_out]
    assert len(held_out) > 20
    assert not names & set(held_out)


def test_the_packaged_target_is_an_ordinary_directory_of_the_promised_size():
    info = read_target_info(PACKAGED_TARGET)
    assert info.model_type == "qwen3"
    assert info.num_layers >= 8
    assert sum(path.stat().st_size for path in PACKAGED_TARGET.iterdir()) < 8_000_000


def test_a_demo_directory_is_continued_only_with_what_it_was_begun_with(tmp_path):
    out = tmp_path
    begun = open_demo(DemoOptions(out, seed=3, topology="disaggregated"), DemoRecipe(num_responses=8))
    with pytest.raises(UserError, match="add --resume"):
        open_demo(DemoOptions(out), DemoRecipe())
    with pytest.raises(UserError, match="begun with seed 3, not 4"):
        open_demo(DemoOptions(out, seed=4, resume=True), DemoRecipe())
    with pytest.raises(UserError, match="begun with train_target False, not True; resume it without --train-target"):
        open_demo(DemoOptions(out, train_target=True, resume=True), DemoRecipe())
    assert open_demo(DemoOptions(out, resume=True), DemoRecipe()) == begun


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_every_algorithm_has_a_recipe_for_the_same_samples(tmp_path, algorithm):
    demo = open_demo(DemoOptions(tmp_path, algorithm=algorithm), DemoRecipe())
    config = demo.run_config()
    assert config.algorithm.name == algorithm
    assert config.training.lr == DRAFTS[algorithm].lr
    assert DRAFTS[algorithm].options.items() <= config.algorithm.model_dump().items()
    other = Demo(tmp_path, demo.seed, demo.topology, "eagle3", demo.recipe, train_target=False).run_config()
    same = ("run_dir", "seed", "topology", "target", "data", "control_plane", "evaluation")
    assert config.model_dump(include=set(same)) == other.model_dump(include=set(same))
    with pytest.raises(UserError, match=f"begun with algorithm {algorithm}, not other"):
        open_demo(DemoOptions(tmp_path, algorithm="other", resume=True), DemoRecipe())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}', '{"settings": {}, "recipe": {"odd": 1}}'])
def test_a_damaged_demo_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(UserError, match="damaged"):
        open_demo(DemoOptions(tmp_path, resume=True), DemoRecipe())


def test_a_demo_killed_in_its_first_instant_can_be_started_again(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / ".demo.json.partial").write_text("{")
    refuse_foreign(tmp_path)
    open_demo(DemoOptions(tmp_path), DemoRecipe())


def test_damaged_wall_seconds_are_counted_anew(tmp_path):
    (tmp_path / "phases.json").write_text('{"respon')
    assert Phases(tmp_path / "phases.json").seconds == {}


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(UserError, match="not empty"):
        run_demo(DemoOptions(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        run_demo(DemoOptions(tmp_path / "precious"))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_two_demos_do_not_share_a_directory(tmp_path):
    out = tmp_path / "demo"
    with run_lock(out), pytest.raises(UserError, match="in use by another process"):
        run_demo(DemoOptions(out))
