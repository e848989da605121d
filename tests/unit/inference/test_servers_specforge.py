import contextlib
import threading

import pytest
import torch
from served_world import wait_until

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CaptureItem, CaptureRequest, Generate, GenerateRequest, InlineSink
from specforge.data_plane.tensors import materialised
from specforge.errors import PromptRefused, ServerBusy, ServerRefused, ServerUnavailable
from specforge.inference.servers.http_client import Answer, refusal
from specforge.inference.servers.specforge import SpecforgeServer
from specforge.testing.fake_server import FakeServer, made_features
from specforge.testing.samples import SMALL_TARGET

SPEC = CaptureSpec((1, 3), True)
TOKENS = tuple(range(9))


def request(**changes):
    values = {"items": (CaptureItem("s", 1, TOKENS),), "spec": SPEC, "sink": InlineSink(), "target_revision": "0"}
    return CaptureRequest(**{**values, **changes})


@pytest.fixture
def fake():
    with FakeServer(SMALL_TARGET) as server:
        yield server


@pytest.fixture
def client(fake):
    server = SpecforgeServer(fake.url)
    yield server
    server.close()


def test_what_a_server_is(fake, client):
    assert client.info(20.0) == fake.info


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_inline_features_have_the_servers_bits(client, dtype):
    spec = CaptureSpec((1, 3), True, dtype)
    captured = client.capture(request(spec=spec), 20.0)
    (tensors,) = captured.tensors
    expected = made_features(TOKENS, spec, SMALL_TARGET.hidden_size)
    assert list(tensors) == list(expected)
    for name, source in expected.items():
        assert torch.equal(tensors[name].view(torch.uint8), materialised(source).view(torch.uint8))


def test_responses(client):
    reply = client.generate(GenerateRequest((TOKENS, TOKENS[:2]), Generate(4)), 20.0)
    assert [item.token_ids for item in reply.items] == [(8, 7, 6, 5), (1, 0)]


UNAVAILABLE = [
    "hang_up",
    "cut",
    "long_length",
    "short_length",
    "truncated",
    "huge",
    "garbage",
    "page",
    "broken",
    "never",
    "slow",
    "trickle",
    "trickled_head",
]


@pytest.mark.parametrize("fault", UNAVAILABLE)
def test_an_answer_that_is_none_is_unavailable_and_names_the_server(fake, client, fault):
    fake.faults.append(fault)
    fake.slow_s = 3600.0
    timeout_s = 1.0 if fault in UNAVAILABLE[-4:] else 20.0
    with pytest.raises(ServerUnavailable, match=fake.url):
        client.capture(request(), timeout_s)
    if fault == "short_length":
        # What it sent beyond its length may be all that the next request on that connection gets, or may be gone.
        with contextlib.suppress(ServerUnavailable):
            client.capture(request(), 20.0)
    assert client.capture(request(), 20.0).tensors[0] is not None


def test_a_busy_server_says_so(fake, client):
    fake.faults.append("busy")
    with pytest.raises(ServerBusy, match="made up: busy"):
        client.capture(request(), 20.0)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("unfit", "422: made up"), ("unauthorized", "give the run the token"), ("moved", "302.*check its address")],
)
def test_a_refusal_says_what_to_do(fake, client, fault, reason):
    fake.always = fault
    with pytest.raises(ServerRefused, match=reason):
        client.capture(request(), 20.0)


def test_a_sample_that_is_too_large_for_an_answer_is_refused_as_such(fake, client):
    fake.most_tokens = len(TOKENS) - 1
    with pytest.raises(PromptRefused, match="422"):
        client.capture(request(), 20.0)
    short = CaptureItem("s", 2, TOKENS[:-1])
    assert client.capture(request(items=(short,)), 20.0).tensors[0] is not None


@pytest.mark.parametrize(
    ("status", "kind"),
    [(413, PromptRefused), (422, ServerRefused), (503, ServerBusy), (500, ServerUnavailable), (302, ServerRefused)],
)
def test_what_a_status_means_and_says(status, kind):
    error = refusal("http://a:1", "/v1/x", Answer(status, "", bytearray(b'{"error": {"message": "why"}}')), {}, "; so")
    assert isinstance(error, kind)
    assert f"http://a:1 answered /v1/x with {status}: why" in str(error)


def test_a_prompt_that_no_server_would_read_is_refused_as_such(fake, client):
    with pytest.raises(PromptRefused, match=r"422.*sample ids"):
        client.capture(request(items=(CaptureItem("s" * 300, 1, TOKENS),)), 20.0)


def test_another_protocol_is_refused(fake):
    client = SpecforgeServer(fake.url + "/elsewhere")
    with pytest.raises(ServerRefused, match="does not speak version 1"):
        client.info(20.0)
    client.close()


def test_the_token_is_shown():
    with FakeServer(SMALL_TARGET, token="secret") as fake:
        for token, is_known in ((None, False), ("guess", False), ("secret", True)):
            client = SpecforgeServer(fake.url, token)
            if is_known:
                assert client.info(20.0) == fake.info
            else:
                with pytest.raises(ServerRefused, match="401") as caught:
                    client.info(20.0)
                assert str(token) not in str(caught.value)
            client.close()


def test_nobody_there_is_unavailable():
    fake = FakeServer(SMALL_TARGET).start()
    fake.stop()
    client = SpecforgeServer(fake.url)
    with pytest.raises(ServerUnavailable, match=f"{fake.url} did not answer /v1/info"):
        client.info(20.0)
    with pytest.raises(ServerUnavailable, match="/v1/sinks/close"):
        client.close_sink(InlineSink())
    client.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://[::1", "http://" + "a" * 300 + ":80"])
def test_whatever_an_address_makes_of_the_client_names_the_server(url):
    client = SpecforgeServer(url)
    with pytest.raises(ServerUnavailable) as caught:
        client.info(20.0)
    assert url in str(caught.value)
    client.close()


def test_close_ends_what_is_in_flight_from_another_thread(fake, client):
    fake.always = "never"
    raised = []

    def ask():
        try:
            client.capture(request(), 3600.0)
        except ServerUnavailable as error:
            raised.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(20)]  # some wait for a connection
    for thread in threads:
        thread.start()
    wait_until(lambda: len(fake.captured) >= 10, "requests are in flight")
    client.close()
    client.close()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive()
    assert len(raised) == 20
    with pytest.raises(ServerUnavailable, match="was closed"):
        client.info(20.0)
