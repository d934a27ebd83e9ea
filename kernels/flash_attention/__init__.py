"""Causal attention whose memory grows with the length, not with its square. See README.md."""

from .api import Implementation, causal_attention
from .reference import SAVED

__all__ = ["SAVED", "Implementation", "causal_attention"]
