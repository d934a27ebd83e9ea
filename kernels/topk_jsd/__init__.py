"""Top-k Jensen-Shannon distillation loss without a [rows, vocabulary] array. See README.md."""

from .api import (
    LossAux,
    sampled_token_loss_from_logits,
    topk_jsd_from_logits,
    topk_jsd_loss,
    topk_jsd_rows,
)
from .sharded import Sharding

__all__ = [
    "LossAux",
    "Sharding",
    "sampled_token_loss_from_logits",
    "topk_jsd_from_logits",
    "topk_jsd_loss",
    "topk_jsd_rows",
]
