import json

from specforge.cli.output import flat, named, print_json, print_table, shown, shown_bytes


def test_json_has_no_word_that_json_does_not_know(capsys, tmp_path):
    print_json({"loss": float("nan"), "nested": [float("inf"), 1.5], "path": tmp_path})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "nested": [None, 1.5], "path": str(tmp_path)}


def test_nested_values_become_dotted_rows():
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": {}}) == [("a.b", 1), ("a.c.d", 2), ("e", {})]


def test_named_rows_are_in_the_order_of_the_names_and_sizes_have_units():
    names = {"b.size_bytes": "size", "missing": "not there", "a": "first"}
    assert named({"a": 1, "b": {"size_bytes": 2048}, "c": 3}, names) == [("size", "2.0 KiB"), ("first", 1)]


def test_cells_are_for_a_person():
    cells = [shown(value) for value in (None, True, 1234567, 0.123456, [1, 2], {}, "x")]
    assert cells == ["-", "yes", "1,234,567", "0.1235", "1, 2", "-", "x"]


def test_bytes_have_units():
    assert [shown_bytes(n) for n in (5, 2048, 3 * 2**20, 2**45)] == ["5 B", "2.0 KiB", "3.0 MiB", "32.0 TiB"]


def test_markup_in_a_value_is_printed_and_not_obeyed(capsys):
    print_table("T", [("path", "[bold]x[/bold] [y")])
    assert "[bold]x[/bold] [y" in capsys.readouterr().out
