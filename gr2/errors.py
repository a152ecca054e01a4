"""Every failure that a user can meet has a name here, and an exit code that a scheduler can act on."""


class GR2Error(Exception):
    """A failure with a sentence that says what to do. Never raised bare: use a subclass."""

    exit_code = 1


class ConfigError(GR2Error):
    """A profile or an override is wrong: unknown key, wrong type, value out of range."""

    exit_code = 2


class InputError(GR2Error):
    """What came from outside cannot be read at all (a truncated file, a missing folder, a path outside its root)."""

    exit_code = 3


class AuditError(GR2Error):
    """An audit failed: nothing was published, the evidence was kept."""

    exit_code = 4


class MissingInputError(GR2Error):
    """A table or a model that this stage reads does not exist yet. The message names the stage that builds it."""

    exit_code = 5


class EnvironmentProblem(GR2Error):
    """The machine lacks something: Java, a compiler, disk, a jar. The message says what to install."""

    exit_code = 6


class ModelError(GR2Error):
    """A model or tokenizer cannot serve: wrong vocabulary, labels of several tokens, a file that is not safetensors."""

    exit_code = 7


class EngineError(GR2Error):
    """A generation engine failed as a whole (one failed request is a row, not an error)."""

    exit_code = 8
