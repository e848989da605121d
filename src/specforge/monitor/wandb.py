"""A run on Weights & Biases. The only file that imports wandb.

What is logged goes to a process of W&B's own, which writes it to disk and sends it: a slow or broken network never
holds up a step. Starting and ending a run wait for that process, no longer than the limits below.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from specforge.errors import ConfigError, MissingExtraError
from specforge.monitor.config import WandbTracker
from specforge.monitor.naming import Hyperparameter, event_text, tracked_name

RUN_ID_FILE = "wandb_run_id"
"""In the run's directory: the id of its W&B run, which a resumed run continues."""
STEP = "optimizer_step"
"""The x axis. W&B's own step cannot go back, and a resumed run repeats steps."""

START_S = 60.0
LOGIN_S = 60.0
FINISH_S = 120.0


class WandbMonitor:
    """The W&B run of ``run_dir``: a new one, or the one that an earlier process of the same run began.

    Raises ``MissingExtraError``, ``ConfigError`` without a usable key, and what wandb raises where it cannot start.
    """

    def __init__(
        self,
        options: WandbTracker,
        run_dir: Path,
        first_step: int,
        hyperparameters: Mapping[str, Hyperparameter],
    ) -> None:
        # W&B would send the traces of errors, ours too, to its makers, even offline; whoever wants that says so
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # noqa: PLC0415
        except ModuleNotFoundError:
            raise MissingExtraError("wandb", "wandb") from None
        self._step = first_step
        online = options.mode == "online"
        try:
            self._run = wandb.init(
                mode=options.mode,
                project=options.project,
                entity=options.entity,
                name=options.name or run_dir.name,
                group=options.group,
                tags=list(options.tags),
                config=dict(hyperparameters),
                dir=str(run_dir),
                id=run_id(run_dir),
                # offline the id alone joins the parts, when they are sent
                resume="allow" if online else None,
                allow_val_change=True,
                # a run that the calling program has open is its own
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    save_code=False,
                    init_timeout=START_S,
                    login_timeout=LOGIN_S,
                    finish_timeout=FINISH_S,
                ),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ConfigError(_refused(error)) from None
        if online and self._run.settings.mode != "online":
            self._run.finish()
            raise ConfigError(_refused(f"W&B went {self._run.settings.mode}"))
        for group in ("train/*", "eval/*", "events/*"):
            self._run.define_metric(group, step_metric=STEP)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._step = step
        self._run.log({STEP: step, **{tracked_name(name): scalar for name, scalar in scalars.items()}})

    def event(self, name: str, **fields: str | float | bool | None) -> None:
        """As a text, at the step that it names or else at the last one that was logged."""
        step = fields.get("step")
        self._run.log({STEP: step if isinstance(step, int) else self._step, f"events/{name}": event_text(fields)})

    def close(self) -> None:
        """Waits until everything is sent, ``FINISH_S`` seconds at most; what is left then, ``wandb sync`` sends."""
        self._run.finish()


def run_id(run_dir: Path) -> str:
    """The id of the W&B run of ``run_dir``; drawn and written down where it has none yet."""
    path = run_dir / RUN_ID_FILE
    if path.exists() and (known := path.read_text(encoding="ascii").strip()):
        return known
    drawn = secrets.token_hex(8)
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(f"{drawn}\n", encoding="ascii")
    partial.replace(path)
    return drawn


def _refused(reason: object) -> str:
    return (
        f"monitor.trackers has wandb with mode online, but W&B cannot be used so ({reason}); set WANDB_API_KEY, or run "
        "wandb login, or choose mode: offline"
    )
