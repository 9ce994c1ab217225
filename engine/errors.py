"""Every failure a user can meet, one class per meaning; each message is one sentence that says what to do."""


class AnyBitError(Exception):
    """Base of all expected failures; `str(error)` is a sentence fit for a user."""


class SourceError(AnyBitError):
    """A source model is missing, damaged, or in a format that is not read."""


class UnsupportedModelError(AnyBitError):
    """The model's architecture or one of its settings is not implemented."""


class CheckpointError(AnyBitError):
    """An AnyBit checkpoint is damaged, altered, or of an unknown version."""


class KernelError(AnyBitError):
    """A loaded weight, multiplied by the kernels that serve it, does not give what the checkpoint says."""


class DownloadError(AnyBitError):
    """The demo model could not be fetched or does not match its known hash."""


class StorageError(AnyBitError):
    """The disk is full or a folder cannot be written."""


class CapacityError(AnyBitError):
    """A request can never fit into the engine's context or KV cache."""


class EngineLoadingError(AnyBitError):
    """The engine is still loading weights."""


class EngineDrainingError(AnyBitError):
    """The engine finishes what it has and accepts nothing new."""


class EngineLostError(AnyBitError):
    """The engine process ended or stopped answering."""
