"""What ``/openapi.json`` says of the control plane: every body, reply, error, header, and the token."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from specforge.contracts.codec import Form
from specforge.control_plane import wire

_ERRORS = {
    "401": "The token is missing or wrong.",
    "408": "The body was not there in time.",
    "409": "The controller refuses; the type says why.",
    "413": "The body is larger than the server reads.",
    "422": "The body or the key is not as described here.",
    "503": "The server is stopping; the same call may be made again.",
}
_COMPONENTS = "#/components/schemas/"


def describe_call(of_body: Form[Any], of_reply: Form[Any], *, keyed: bool) -> dict[str, Any]:
    """Of a POST. ``keyed``: it carries the header with the key of the call."""
    key = {
        "name": wire.KEY_HEADER,
        "in": "header",
        "required": True,
        "description": "Names the call; repeated with the same key and body it is answered as before.",
        "schema": {"type": "string", "minLength": 1, "maxLength": wire.MAX_KEY_CHARS, "pattern": "^[!-~]+$"},
    }
    return {
        "parameters": [key] if keyed else [],
        "requestBody": {"required": True, "content": _json(_schema(of_body))},
        "responses": {"200": _answer("Carried out.", _schema(of_reply)), **_errors(*_ERRORS)},
    }


def describe_reading(reply: Form[Any] | None, *, public: bool) -> dict[str, Any]:
    """Of a GET; ``reply`` None: plain text. ``public``: it needs no token."""
    content = {"text/plain": {"schema": {"type": "string"}}} if reply is None else _json(_schema(reply))
    described = {"200": {"description": "As it is.", "content": content}}
    if public:
        return {"responses": {**described, **_errors("503")}, "security": []}
    return {"responses": {**described, **_errors("401", "503")}}


def describe_application(app: FastAPI) -> dict[str, Any]:
    """The whole document."""
    calls: list[tuple[Form[Any], Form[Any]]] = [wire.LEASE, wire.RECORD, wire.COMMIT, wire.FAIL, wire.HEARTBEAT]
    calls += [wire.LEAVE, wire.ACK, wire.CHECKPOINTED, wire.POLL, wire.CONSUMED]
    components: dict[str, Any] = {}
    for form in [*(form for call in calls for form in call), wire.HEALTH, wire.ERROR]:
        components |= form.adapter.json_schema(ref_template=_COMPONENTS + "{model}").get("$defs", {})

    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    document["components"] = {
        "schemas": components,
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "The token of the run."}},
    }
    document["security"] = [{"token": []}]
    for path in document["paths"].values():
        for operation in path.values():
            # FastAPI describes what it would have parsed and answered itself.
            for response in operation["responses"].values():
                response["content"] = {kind: of for kind, of in response["content"].items() if of["schema"]}
    return document


def _schema(form: Form[Any]) -> dict[str, Any]:
    """A reference to the component; what is no dataclass has none and is written out."""
    schema: dict[str, Any] = form.adapter.json_schema(ref_template=_COMPONENTS + "{model}")["prefixItems"][0]
    return schema


def _errors(*statuses: str) -> dict[str, Any]:
    return {status: _answer(_ERRORS[status], _schema(wire.ERROR)) for status in statuses}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": _json(schema)}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
