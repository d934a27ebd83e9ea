"""Writes a trained model as a Hugging Face directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax

from rosd_jax import atomic
from rosd_jax.evals.card import model_card
from rosd_jax.models.lora import merge
from rosd_jax.models.peft_files import save_adapters
from rosd_jax.models.weights import save_pretrained
from rosd_jax.train import history
from rosd_jax.train.inputs import trained_on
from rosd_jax.train.run import Run
from rosd_jax.types import Params


def export(run: Run, params: Params, path: Path, step: int) -> None:
    """Writes the model of a step: weights, config, tokenizer, and a model card with its scores.

    LoRA adapters are merged into it, and also written to adapter/ for PEFT. The step is in trained_steps.txt.
    """
    source = Path(run.config.model.path)
    lora = run.config.model.lora
    if lora.rank:
        save_adapters(
            path / "adapter",
            params,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=tuple(lora.targets),
            base=str(source),
        )
        params = jax.jit(partial(merge, config=run.inputs.model))(params)
    save_pretrained(
        path,
        params,
        run.inputs.model,
        source=source,
        dtype=run.config.model.dtype,
        progress=run.console.progress,
    )
    if run.hosts.first:
        run.inputs.tokenizer.save(path)
        card = model_card(run.config, run.directory, trained_on(run.config), step)
        atomic.write_text(path / "README.md", [card])
        atomic.write_text(path / history.EXPORTED, [f"{step}\n"])
