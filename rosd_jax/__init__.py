"""ROSD: reflective on-policy self-distillation (arXiv 2605.28014) in JAX."""

__version__ = "0.1.0"
