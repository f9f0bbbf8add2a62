"""jaxinfer: LLM inference on JAX/XLA for TPU, GPU and CPU. This is the whole public surface."""

from jaxinfer import _gc
from jaxinfer.config import EngineConfig as EngineConfig
from jaxinfer.config import ModelConfig as ModelConfig
from jaxinfer.errors import CapacityError as CapacityError
from jaxinfer.errors import ConfigError as ConfigError
from jaxinfer.errors import EngineDeadError as EngineDeadError
from jaxinfer.errors import InvalidRequestError as InvalidRequestError
from jaxinfer.errors import JaxInferError as JaxInferError
from jaxinfer.errors import ModelFormatError as ModelFormatError
from jaxinfer.errors import NumericalError as NumericalError
from jaxinfer.errors import RecompileError as RecompileError
from jaxinfer.errors import TokenizerError as TokenizerError
from jaxinfer.generate import Generated as Generated
from jaxinfer.generate import generate as generate
from jaxinfer.llm import LLM as LLM
from jaxinfer.request import CompletionOutput as CompletionOutput
from jaxinfer.request import Logprob as Logprob
from jaxinfer.request import RequestOutput as RequestOutput
from jaxinfer.sampling_params import RequestOutputKind as RequestOutputKind
from jaxinfer.sampling_params import SamplingParams as SamplingParams

_gc.resume()

__version__ = "0.1.0"
