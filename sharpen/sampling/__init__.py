"""Prompts to samples."""

from .base import FinishReason as FinishReason
from .base import Prompt as Prompt
from .base import Sampler as Sampler
from .base import Samples as Samples
from .base import SamplingConfig as SamplingConfig
