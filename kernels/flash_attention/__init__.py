"""Causal attention whose memory grows with the length, not with its square. See README.md."""

from .api import Implementation, causal_attention

__all__ = ["Implementation", "causal_attention"]
