"""Top-k Jensen-Shannon distillation loss that never holds a [rows, vocabulary] array. See README.md."""

from .api import (
    sampled_token_loss_from_logits,
    topk_jsd_from_logits,
    topk_jsd_loss,
    topk_jsd_rows,
)
from .records import LossAux
from .sharded import Sharding

__all__ = [
    "LossAux",
    "Sharding",
    "sampled_token_loss_from_logits",
    "topk_jsd_from_logits",
    "topk_jsd_loss",
    "topk_jsd_rows",
]
