from specforge.config.keys import all_keys
from specforge.config.load import load_run_config
from specforge.config.reference import reference
from specforge.config.run import RunConfig


def test_reference_page_is_current(repository):
    assert (repository / "docs/reference/run-config.md").read_text() == reference(), (
        "write it again: python -m specforge.config.reference docs/reference/run-config.md"
    )


def test_every_key_is_described_and_on_the_page():
    page = reference()
    for key in all_keys(RunConfig):
        assert key.field.description, key.path
        assert f"`{key.path}`" in page


def test_example_recipes_load(repository):
    recipes = sorted((repository / "examples").glob("*/run.yaml"))
    assert recipes
    for recipe in recipes:
        assert load_run_config(recipe).data.path.is_file()
