"""The target engines of a run: with ``compose`` the only file that names them."""

from __future__ import annotations

import torch

from specforge.config.run import RunConfig
from specforge.contracts.capture import TargetInfo
from specforge.data_plane.offline import FeatureSet
from specforge.inference.engine import TargetEngine
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.offline import OfflineManifestReader
from specforge.launch.inputs import resolve_device, resolve_dtype


def make_engine(config: RunConfig, target: TargetInfo) -> TargetEngine:
    """The frozen target, in this process; or what was captured of it earlier."""
    torch.set_num_threads(config.training.threads)
    if config.data.features is not None:
        return OfflineManifestReader(target, FeatureSet(config.data.features))
    return load_target(config, target)


def load_target(config: RunConfig, target: TargetInfo) -> HFTargetEngine:
    """The frozen target, in this process, also of a run over features that were captured earlier."""
    device = resolve_device(config.target.device)
    dtype = str(resolve_dtype(config.target.dtype, device)).removeprefix("torch.")
    return HFTargetEngine(target, dtype, device, config.target.trust_remote_code)
