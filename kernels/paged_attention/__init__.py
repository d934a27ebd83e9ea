"""One decoding step's attention over a paged key-value cache. README.md says how it is laid out."""

from .api import Implementation, misfit, platform_of, write_and_attend
from .operands import Operands

__all__ = ["Implementation", "Operands", "misfit", "platform_of", "write_and_attend"]
