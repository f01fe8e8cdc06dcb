"""The error of a model that cannot be loaded. It has no imports, so that the front process shares it without torch."""


class CheckpointError(ValueError):
    """A model cannot be found, downloaded or read; the message is one sentence that names it and says what to do."""
