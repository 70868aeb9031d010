"""Prompts to samples."""

from .protocol import FinishReason as FinishReason
from .protocol import Prompt as Prompt
from .protocol import Sampler as Sampler
from .protocol import Samples as Samples
from .protocol import SamplingConfig as SamplingConfig
