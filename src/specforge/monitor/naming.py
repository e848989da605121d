"""How metrics, events and options are called in trackers: the same in all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Hyperparameter = str | float | bool | None

EVALUATION_PREFIX = "eval/"
_USER_INFO = re.compile(r"(?<=://)[^/?#\s\"']*@")
_SECRET_VALUE = re.compile(
    r"""([?&;](?:[^=&;\#\s"']*(?:token|secret|passw|credential|signature|api[-_]?key|access[-_]?key)[^=&;\#\s"']*
    |key|auth|sig|pwd)=)[^&;\#\s"']*""",
    re.IGNORECASE | re.VERBOSE,
)


def tracked_name(metric: str) -> str:
    """``train/loss`` for ``loss``; metrics of an evaluation have their group, ``eval/``, in their name already."""
    return metric if metric.startswith(EVALUATION_PREFIX) else f"train/{metric}"


def event_text(fields: Mapping[str, str | float | bool | None]) -> str:
    """The fields of an event in one line, such as ``step: 1, num_slots: 64``."""
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())


def hyperparameters(configuration: Mapping[str, Any]) -> dict[str, Hyperparameter]:
    """The options of a run by their dotted keys; ``configuration`` is nested and holds what JSON can hold.

    A run's configuration has no field for a secret. Of a URL in an option that a plug-in brings, the user and password
    and the values of keys such as ``token`` are cut out. Lists become JSON.
    """
    flat: dict[str, Hyperparameter] = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{below}": leaf for below, leaf in hyperparameters(value).items()})
        elif isinstance(value, list | tuple):
            flat[name] = _without_secrets(json.dumps(value))
        else:
            flat[name] = _without_secrets(value) if isinstance(value, str) else value
    return flat


def _without_secrets(text: str) -> str:
    return _SECRET_VALUE.sub(r"\1***", _USER_INFO.sub("***@", text))
