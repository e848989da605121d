"""The target engines and capture servers of a run: with ``compose`` the only file that names them."""

from __future__ import annotations

import contextlib

import torch

from specforge.config.run import RunConfig
from specforge.contracts.capture import TargetInfo
from specforge.data_plane.offline import FeatureSet
from specforge.errors import ConfigError
from specforge.inference.config import ServersConfig
from specforge.inference.engine import TargetEngine
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.offline import OfflineManifestReader
from specforge.inference.servers.base import CaptureServer
from specforge.inference.servers.engine import ServerTargetEngine
from specforge.inference.servers.listing import ServerListing
from specforge.inference.servers.sglang import SglangServer
from specforge.inference.servers.specforge import SpecforgeServer
from specforge.inference.servers.terms import Terms
from specforge.inference.servers.vllm import VllmServer
from specforge.launch.capture_token import read_token
from specforge.launch.inputs import resolve_device, resolve_dtype


def make_engine(config: RunConfig, target: TargetInfo) -> TargetEngine:
    """The frozen target, in this process or in servers; or what was captured of it earlier."""
    torch.set_num_threads(config.training.threads)
    if config.data.features is not None:
        return OfflineManifestReader(target, FeatureSet(config.data.features))
    if config.target.servers is not None:
        return ask_servers(config, config.target.servers, target)
    return load_target(config, target)


def open_engine(config: RunConfig, target: TargetInfo, resources: contextlib.ExitStack) -> TargetEngine:
    """``make_engine``'s, which ``resources`` close."""
    engine = make_engine(config, target)
    resources.callback(engine.close)
    return engine


def ask_servers(config: RunConfig, servers: ServersConfig, target: TargetInfo) -> ServerTargetEngine:
    """The servers that are listed now, which answer this process with features."""
    token = read_token(servers.token_file)
    urls = ServerListing(servers.urls, servers.file).current()
    connected = [connect_server(servers.dialect, url, token, servers.max_in_flight) for url in urls]
    return ServerTargetEngine(connected, target, servers.max_in_flight, servers.timeout_s, terms=terms_of(config))


def terms_of(config: RunConfig) -> Terms:
    """What the run wants of its servers alike."""
    dtype = config.target.dtype
    return Terms(
        None if dtype == "auto" else dtype,
        num_tokens=config.data.max_length,
        strict=config.control_plane.order == "strict",
    )


def make_evaluation_engine(config: RunConfig, target: TargetInfo) -> TargetEngine:
    """What captures held-out samples: the run's servers, else the target here."""
    servers = config.target.servers
    return load_target(config, target) if servers is None else ask_servers(config, servers, target)


def load_target(config: RunConfig, target: TargetInfo) -> HFTargetEngine:
    """The frozen target, in this process, also of a run over features that were captured earlier."""
    device = resolve_device(config.target.device)
    dtype = str(resolve_dtype(config.target.dtype, device)).removeprefix("torch.")
    return HFTargetEngine(target, dtype, device, config.target.trust_remote_code)


def connect_server(dialect: str, url: str, token: str | None, max_in_flight: int = 14) -> CaptureServer:
    """The server at ``url``, which speaks ``dialect`` (of ``ServersConfig``). Nothing is asked of it yet.

    Up to ``max_in_flight`` requests wait for no connection, nor do a question what it is and a good-bye beside them.
    """
    max_connections = max_in_flight + 2
    match dialect:
        case "specforge":
            return SpecforgeServer(url, token, max_connections)
        case "vllm":
            return VllmServer(url, token, max_connections)
        case "sglang":
            return SglangServer(url, token, max_connections)
    raise ConfigError(f"no dialect {dialect!r} of capture servers is known; choose one of specforge, vllm, sglang")
