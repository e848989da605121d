"""The exception tree of SpecForge.

SpecForgeError
|-- UserError                 the user can fix it: one sentence, exit code 2
|   |-- ConfigError           a run configuration that cannot be run
|   |-- DataError             a prompt file or dataset that cannot be used
|   |-- TargetError           a target directory that cannot be used
|   |-- DraftError            a draft directory or checkpoint that cannot be used
|   `-- MissingExtraError     an optional dependency is not installed
|-- ContractError             a record that breaks a contract (a tensor in metadata, an unknown field, ...)
|-- ControlPlaneError         the ledger, the controller or the channel refused
|   |-- InvalidTransition     a sample or slot is not in the state that the transition needs
|   |-- StaleGeneration       a late call of an expired attempt: what it made must be freed
|   |-- ChannelClosed         publish after close
|   `-- ProducerFailed        the other side of the channel failed; never mistaken for an end of stream
|-- FeatureStoreError
|   |-- FeatureStoreFull      over budget now: back-pressure, succeeds after frees
|   |-- FeatureTooLarge       larger than the store can ever hold: never succeeds
|   |-- FeatureNotFound       no live features of that sample and generation
|   `-- CorruptFeature        bytes are short, torn or of another shape
|-- EngineError               the target engine failed
|   |-- ServerUnavailable     a capture server did not answer, or not properly: another one, or later, may
|   |   `-- ServerBusy        it says that it has not begun with the request: nothing that was asked is to blame
|   |-- ServerRefused         a capture server that cannot serve this run at all: another model, other layers
|   |   `-- CaptureTestFailed its features are not what their names promise
|   `-- PromptRefused         an engine that is well cannot capture this prompt
`-- RunFailed                 a run ended because one of its sides failed; carries the original traceback
"""

from __future__ import annotations


class SpecForgeError(Exception):
    """Root of all exceptions that SpecForge raises on purpose."""


class UserError(SpecForgeError):
    """Something the user can fix. The message says what was expected, what was got and what to do."""


class ConfigError(UserError):
    """A run configuration that cannot be run."""


class DataError(UserError):
    """A prompt file or dataset that cannot be used."""


class TargetError(UserError):
    """A target directory that cannot be used."""


class DraftError(UserError):
    """A draft directory or a checkpoint that cannot be used."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. Install it with: pip install 'specforge[{extra}]'")


class ContractError(SpecForgeError):
    """A record that breaks a contract."""


class ControlPlaneError(SpecForgeError):
    """The ledger, the controller or the channel refused."""


class InvalidTransition(ControlPlaneError):
    """A sample or slot is not in the state that the transition needs."""


class StaleGeneration(ControlPlaneError):
    """A call of an attempt that is no longer the live one. What that attempt made must be freed."""


class ChannelClosed(ControlPlaneError):
    """Publishing on a channel that was closed."""


class ProducerFailed(ControlPlaneError):
    """The producer of a channel failed; its reason is in the message."""


class FeatureStoreError(SpecForgeError):
    """The feature store refused."""


class FeatureStoreFull(FeatureStoreError):
    """Over budget at this moment. Back-pressure: the same put succeeds after frees."""


class FeatureTooLarge(FeatureStoreError):
    """Larger than the store can ever hold."""


class FeatureNotFound(FeatureStoreError):
    """No live features of that sample and generation."""


class CorruptFeature(FeatureStoreError):
    """Bytes are short, torn or of another shape than the reference says."""


class EngineError(SpecForgeError):
    """The target engine failed."""


class ServerUnavailable(EngineError):
    """A capture server did not answer, or not properly. Another one may, or the same one later."""


class ServerBusy(ServerUnavailable):
    """A capture server that says it has not begun with the request. Nothing that was asked is to blame for it."""


class ServerRefused(EngineError):
    """A capture server that cannot serve this run, however often it is asked: another model, other layers, a token that
    it does not take. The message names the server.
    """


class CaptureTestFailed(ServerRefused):
    """A capture server failed the self-test. The message names the conventions that it breaks, and what to do."""


class PromptRefused(EngineError):
    """An engine that is well cannot capture this prompt."""


class RunFailed(SpecForgeError):
    """A run ended because one of its sides failed."""
