"""What ``/openapi.json`` says of a capture server."""

from __future__ import annotations

from typing import Any

from specforge import __version__
from specforge.contracts import capture_wire as wire
from specforge.contracts.codec import Form
from specforge.data_plane.inline import MEDIA_TYPE

_ERRORS = {
    "401": "The token is missing or wrong.",
    "409": "The server has another model than was meant.",
    "422": "The request is not as described here, or not for this server.",
    "500": "The engine or the store failed.",
    "503": "The server is busy, or about to stop; it may take the same request later.",
}
_COMPONENTS = "#/components/schemas/"
_CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}


def describe() -> dict[str, Any]:
    """The whole document."""
    features = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
    paths = {
        "/healthz": {"get": {**_reading(_CLOSED | {"properties": {"status": {"const": "ok"}}}), "security": []}},
        "/v1/info": {"get": _reading(_schema(wire.INFO), "401")},
        "/v1/capture": {"post": _call(wire.CAPTURE[0], {**_json(_schema(wire.CAPTURE[1])), **features})},
        "/v1/generate": {"post": _call(wire.GENERATE[0], _json(_schema(wire.GENERATE[1])))},
        "/v1/sinks/close": {"post": _call(wire.CLOSE_SINK, _json(_CLOSED))},
    }
    components: dict[str, Any] = {}
    for form in (*wire.CAPTURE, *wire.GENERATE, wire.CLOSE_SINK, wire.INFO, wire.REFUSAL):
        components |= form.adapter.json_schema(ref_template=_COMPONENTS + "{model}").get("$defs", {})
    return {
        "openapi": "3.1.0",
        "info": {"title": "SpecForge capture server", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "The server's token."}},
        },
        "security": [{"token": []}],
    }


def _call(of_body: Form[Any], reply: dict[str, Any]) -> dict[str, Any]:
    return {
        "requestBody": {"required": True, "content": _json(_schema(of_body))},
        "responses": {"200": {"description": "Done.", "content": reply}, **_errors(*_ERRORS)},
    }


def _reading(reply: dict[str, Any], *errors: str) -> dict[str, Any]:
    return {"responses": {"200": {"description": "As it is.", "content": _json(reply)}, **_errors(*errors, "503")}}


def _errors(*statuses: str) -> dict[str, Any]:
    body = _json(_schema(wire.REFUSAL))
    return {status: {"description": _ERRORS[status], "content": body} for status in statuses}


def _schema(form: Form[Any]) -> dict[str, Any]:
    """A reference to the component."""
    schema: dict[str, Any] = form.adapter.json_schema(ref_template=_COMPONENTS + "{model}")["prefixItems"][0]
    return schema


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
