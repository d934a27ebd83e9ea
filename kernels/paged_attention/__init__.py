"""One decoding step's attention over a paged key-value cache. README.md says how it is laid out."""

from .api import Implementation, write_and_attend
from .operands import Operands

__all__ = ["Implementation", "Operands", "write_and_attend"]
