"""The command that ``specforge capture`` prints can be typed as it is."""

from pathlib import Path

from specforge.cli.capture import _resets
from specforge.config.load import run_config_from


def test_what_says_how_the_prompts_were_read_is_taken_back():
    content = {
        "run_dir": "run",
        "target": {"path": "target"},
        "data": {"path": "data.jsonl", "format": "messages", "last_turn_only": True, "chat_template": "chat.jinja"},
    }
    resets = _resets(run_config_from(content, Path("/tmp")))
    assert resets == ["data.format=auto", "data.chat_template=null", "data.last_turn_only=false"]
