"""The errors a user can meet. Each message says what was given, what is allowed, where, and what
to do.

User mistakes are `ValueError`s, so callers who know only the standard library can catch them.
"""


class JaxInferError(Exception):
    """Base of every error that jaxinfer raises on purpose."""


class InvalidRequestError(JaxInferError, ValueError):
    """A prompt, sampling parameter or call argument that cannot be served.

    `param` is the path of the offending field (`prompt[3]`, `temperature`), `value` what was given.
    """

    def __init__(self, message: str, *, param: str | None = None, value: object = None):
        super().__init__(message)
        self.param = param
        self.value = value


class ModelFormatError(JaxInferError, ValueError):
    """A weight file (safetensors, GGUF) that is malformed, truncated or does not fit the model.

    `path` names the file, `field` the tensor or header field, `offset` the byte where it was found.
    """

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        field: str | None = None,
        offset: int | None = None,
    ):
        super().__init__(message)
        self.path = path
        self.field = field
        self.offset = offset


class ConfigError(JaxInferError, ValueError):
    """A model or engine configuration with a missing, contradictory or impossible value."""

    def __init__(self, message: str, *, path: object = None, field: str | None = None):
        super().__init__(message)
        self.path = path
        self.field = field


class TokenizerError(JaxInferError, ValueError):
    """A tokenizer file that cannot be read or does not agree with the model."""

    def __init__(self, message: str, *, path: object = None):
        super().__init__(message)
        self.path = path


class CapacityError(JaxInferError, ValueError):
    """Something that cannot fit: a model in memory, a request in the page pool, a queue that is
    full."""

    def __init__(self, message: str, *, need: int | None = None, have: int | None = None):
        super().__init__(message)
        self.need = need
        self.have = have


class NumericalError(JaxInferError, RuntimeError):
    """The model gave NaN or infinite logits for a request; that request alone is ended."""


class RecompileError(JaxInferError, RuntimeError):
    """`strict=True` and XLA compiled something after warm-up."""


class EngineDeadError(JaxInferError, RuntimeError):
    """The engine met a fault it cannot recover from, or was closed."""
