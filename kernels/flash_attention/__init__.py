"""Causal attention whose memory grows linearly with the sequence length. See README.md."""

from .api import Implementation, causal_attention
from .names import SAVED

__all__ = ["SAVED", "Implementation", "causal_attention"]
