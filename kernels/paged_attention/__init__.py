"""One decoding step's attention over a paged key-value store. README.md says how it is laid out."""

from .api import Implementation, write_and_attend

__all__ = ["Implementation", "write_and_attend"]
