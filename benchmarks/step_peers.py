"""The contestants of the update's benchmark, each in its own process.

    PYTHON -m benchmarks.step_peers {ours,plain,tunix,trl} FOLDER

FOLDER holds model/ (a Hugging Face directory, for student and teacher), rows.npz (a Lesson's fields, rows
padded to the longest) and settings.json. For each JSON line on stdin a worker makes one update of all rows
and answers {"loss": the mean over active tokens before the update, "cpu_s": processor seconds,
"peak_bytes": the process's peak memory so far}.

    ours    rosd_jax's update, with rows split over the number of CPU devices in settings.json
    plain   the same Flax model with [T, T] attention, every row as wide as the longest, all logits at
            once, micro-batches of a few rows in one jitted update
    tunix   its DistillationTrainer with its own Qwen3, gradients accumulated over the same micro-batches.
            None of its strategies has this loss, so it is given one with the loss of `plain`
    trl     SDPOTrainer's own loss (JSD of the student's top k with a tail, capped ratio), training_step
            and optimizer, on given rollouts

Dimensions: B rows, P tokens of a prompt, Q of a teacher's prompt, R of a response, T of prompt and response,
D width, V vocabulary.
"""

# pyright: reportMissingImports=false
# Peers are installed in environments of their own.

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_peers import MARK

Rows = dict[str, np.ndarray]
Step = Callable[[], float]  # makes one update and returns its loss
Contestant = Callable[[Path, Rows, dict[str, Any]], Step]


def ours(folder: Path, rows: Rows, settings: dict[str, Any]) -> Step:
    """rosd_jax's update."""
    import jax

    jax.config.update("jax_num_cpu_devices", settings["devices"])
    from rosd_jax.config import default_config, validate
    from rosd_jax.models.families import read_config
    from rosd_jax.models.sharding import make_mesh
    from rosd_jax.train.trees import Trees
    from rosd_jax.train.update import make_optimizer, make_update
    from rosd_jax.types import Lesson

    config = default_config()
    config.model.update(path=str(folder / "model"), dtype="float32", remat="none")
    config.loss.update(topk=settings["k"], ratio_cap=settings["cap"], chunk=settings["chunk"])
    config.optimizer.update(lr=settings["lr"], warmup_steps=0)
    config.update_from_flattened_dict(settings["limits"])
    config = validate(config)
    model = read_config(folder / "model", num_tokens=None, dtype="float32", remat="none")
    mesh = make_mesh(-1, 1, 1)
    optimizer = make_optimizer(config)
    trees = Trees(config, model, mesh, optimizer)
    state = trees.first()
    frozen = trees.frozen(state)
    update = make_update(config, model, optimizer, mesh, trees.shardings)
    lesson = Lesson(
        prompts=texts(rows["prompt_BP"], rows["prompt_len_B"]),
        teacher_prompts=texts(rows["teacher_prompt_BQ"], rows["teacher_prompt_len_B"]),
        response_BR=rows["response_BR"],
        weight_BR=rows["weight_BR"],
        sampler_logp_BR=rows["sampler_logp_BR"],
    )

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics, _ = update(state, frozen, lesson)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def plain(folder: Path, rows: Rows, settings: dict[str, Any]) -> Step:
    """Plain Flax and optax."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.step_loss import plain_loss
    from rosd_jax.kernels.flash_attention import causal_attention
    from rosd_jax.models import qwen3
    from rosd_jax.models.families import read_config
    from rosd_jax.models.weights import load_params

    def whole_attention(q, k, v):
        return causal_attention(q, k, v, implementation="reference")

    qwen3.attend = whole_attention
    model = read_config(folder / "model", num_tokens=None, dtype="float32", remat="none")
    params = load_params(folder / "model", model)
    frozen = load_params(folder / "model", model)
    optimizer = optax_optimizer(settings)
    which = dict(k=settings["k"], cap=settings["cap"])
    weight_BR = rows["weight_BR"] / rows["weight_BR"].sum()
    student = sequences(rows, "", left=False)
    teacher = sequences(rows, "teacher_", left=False)
    given = (*student, *teacher, rows["response_BR"], rows["sampler_logp_BR"], weight_BR)
    groups = [np.asarray(x).reshape(-1, settings["rows"], *x.shape[1:]) for x in given]

    def logits(params, tokens_BT, length_B, R):
        hidden_BTD = qwen3.hidden_states(params, model, tokens_BT)
        at_BR = length_B[:, None] - 1 + jnp.arange(R)
        return qwen3.logits(params, model, jnp.take_along_axis(hidden_BTD, at_BR[..., None], axis=1))

    def loss(params, frozen, group):
        tokens_BT, length_B, teacher_BT, teacher_length_B, response_BR, *rest = group
        R = response_BR.shape[1]
        student_BRV = logits(params, tokens_BT, length_B, R)
        teacher_BRV = logits(frozen, teacher_BT, teacher_length_B, R)
        return plain_loss(student_BRV, teacher_BRV, response_BR, *rest, **which)

    def update(params, moments, frozen, groups):
        def add(sums, group):
            found = jax.value_and_grad(loss)(params, frozen, group)
            return jax.tree.map(jnp.add, sums, found), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        (value, grads), _ = jax.lax.scan(add, zeros, groups)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    update = jax.jit(update, donate_argnums=(0, 1))
    moments = optimizer.init(params)

    def step() -> float:
        nonlocal params, moments
        params, moments, value = jax.block_until_ready(update(params, moments, frozen, groups))
        return float(value)

    return step


def tunix(folder: Path, rows: Rows, settings: dict[str, Any]) -> Step:
    """tunix's DistillationTrainer."""
    import jax
    import jax.numpy as jnp
    from tunix import DistillationTrainer
    from tunix.distillation import strategies
    from tunix.distillation.distillation_trainer import TrainingConfig, TrainingInput
    from tunix.models.qwen3 import params as weights
    from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

    from benchmarks.decode_peers import tunix_config
    from benchmarks.step_loss import plain_loss

    config = tunix_config(folder / "model")
    size = settings["rows"]
    which = dict(k=settings["k"], cap=settings["cap"])
    turns = len(rows["weight_BR"]) // size
    # Times `turns`, since its trainer takes the mean over the turns.
    weight_BR = turns * rows["weight_BR"] / rows["weight_BR"].sum()
    R = weight_BR.shape[1]

    def load():
        return weights.create_model_from_safe_tensors(str(folder / "model"), config, dtype=jnp.float32)

    class TopK(strategies.BaseStrategy):
        """Our loss, which none of its own strategies has."""

        def compute_loss(self, student_output, teacher_output, labels):
            value = plain_loss(student_output, teacher_output, *labels, **which)
            return value, {"loss": value}

        def compute_eval_loss(self, student_output, labels):
            raise NotImplementedError

    def forward(who: str):
        def run(model, input_tokens, input_mask):
            mask_BT = input_mask[who]
            positions_BT = build_positions_from_mask(mask_BT)
            seen_BTT = make_causal_attn_mask(mask_BT)
            return model(input_tokens[who], positions_BT, None, seen_BTT)[0][:, -R - 1 : -1]

        return run

    def labels(input_tokens, input_mask):
        return input_tokens["response"], input_mask["sampler_logp"], input_mask["weight"]

    class Trainer(DistillationTrainer):
        """Records the losses."""

        def _post_process_train_step(self, aux):
            losses.append(aux["loss"])

    losses: list[jax.Array] = []
    strategy = TopK(forward("student"), forward("teacher"), labels)
    how = TrainingConfig(eval_every_n_steps=10**9, gradient_accumulation_steps=turns)
    trainer = Trainer(load(), load(), strategy, optax_optimizer(settings), how)
    trainer.is_managed_externally = True  # so that its loop may run more than once
    student, student_mask = sequences(rows, "", left=True)
    teacher, teacher_mask = sequences(rows, "teacher_", left=True)
    batches = []
    for at in range(0, turns * size, size):
        some = slice(at, at + size)
        tokens = dict(student=student[some], teacher=teacher[some], response=rows["response_BR"][some])
        mask = dict(student=student_mask[some], teacher=teacher_mask[some], weight=weight_BR[some])
        mask["sampler_logp"] = rows["sampler_logp_BR"][some]
        batches.append(TrainingInput(input_tokens=tokens, input_mask=mask))

    def step() -> float:
        losses.clear()
        trainer.train(batches)
        jax.block_until_ready(jax.tree.leaves(trainer.model))
        return float(np.mean(jax.device_get(losses)))

    return step


def trl(folder: Path, rows: Rows, settings: dict[str, Any]) -> Step:
    """TRL's SDPOTrainer."""
    import tempfile
    from dataclasses import replace

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    size = settings["rows"]
    turns = len(rows["weight_BR"]) // size

    class Trainer(SDPOTrainer):
        """Takes prepared rows, and a mask within the response, which the original has not."""

        def _prepare_inputs(self, generation_batch):
            return generation_batch

        def _compute_teacher_student_logits(self, model, teacher_model, inputs):
            found = super()._compute_teacher_student_logits(model, teacher_model, inputs)
            return replace(found, loss_mask=found.loss_mask * inputs["weight"])

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    out = tempfile.mkdtemp()
    config = SDPOConfig(
        output_dir=out,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=turns,
        num_generations=2,
        distillation_mode="topk_logits",
        distillation_topk=settings["k"],
        distillation_alpha=0.5,
        distillation_add_tail=True,
        distillation_is_clip=settings["cap"],
        teacher_model_kind="base",
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=settings["weight_decay"],
        adam_beta2=settings["b2"],
        max_grad_norm=settings["clip"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = Trainer(
        model,
        reward_funcs=lambda **_: [0.0],
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [""]}),
    )
    model = trainer.accelerator.prepare(trainer.model)
    optimizer = trainer.create_optimizer()
    model.train()
    trainer.current_gradient_accumulation_steps = turns
    batches = trl_batches(rows, size)
    logged = trainer._metrics["train"]["self_distillation/distillation_loss"]

    def step() -> float:
        logged.clear()
        for batch in batches:
            trainer.training_step(model, batch, None)
        trainer.accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        # It logs the mean over each turn's tokens, but differentiates the mean of its sequences' means.
        active = [float(batch["weight"].sum()) for batch in batches]
        return float(np.average(logged, weights=active))

    return step


def trl_batches(rows: Rows, size: int) -> list[dict[str, Any]]:
    """What TRL's `_prepare_inputs` would return, and `weight`."""
    import torch

    R = rows["response_BR"].shape[1]
    inside_BR = np.arange(R) < rows["response_len_B"][:, None]
    student_BT, student_mask_BT = sequences(rows, "", left=True)
    teacher_BT, teacher_mask_BT = sequences(rows, "teacher_", left=True)
    fields = dict(
        prompt_ids=student_BT[:, :-R],
        prompt_mask=student_mask_BT[:, :-R],
        completion_mask=inside_BR,
        completion_ids=rows["response_BR"],
        old_per_token_logps=rows["sampler_logp_BR"],
        teacher_input_ids=teacher_BT,
        teacher_attention_mask=teacher_mask_BT,
        weight=rows["weight_BR"],
    )

    def tensor(x):
        return torch.from_numpy(x if x.dtype == np.float32 else x.astype(np.int64))

    tensors = {name: tensor(x) for name, x in fields.items()}
    starts = range(0, len(inside_BR), size)
    return [{name: x[at : at + size] for name, x in tensors.items()} for at in starts]


def texts(tokens_BP: np.ndarray, length_B: np.ndarray) -> list[list[int]]:
    """The rows without their padding."""
    return [tokens_P[:length].tolist() for tokens_P, length in zip(tokens_BP, length_B, strict=True)]


def sequences(rows: Rows, who: str, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with their responses [B, P + R], and the prompts' lengths.

    left: prompts are padded on the left, and a mask is returned instead of the lengths.
    """
    prompt_BP = rows["teacher_prompt_BQ" if who else "prompt_BP"]
    length_B = rows[f"{who}prompt_len_B"]
    response_BR = rows["response_BR"]
    B, P = prompt_BP.shape
    R = response_BR.shape[1]
    tokens_BT = np.zeros((B, P + R), np.int32)
    mask_BT = np.zeros((B, P + R), bool)
    for row, (length, answer) in enumerate(zip(length_B, rows["response_len_B"], strict=True)):
        start = P - length if left else 0
        end = start + length + answer
        tokens_BT[row, start:end] = np.append(prompt_BP[row, :length], response_BR[row, :answer])
        mask_BT[row, start:end] = True
    return tokens_BT, mask_BT if left else length_B


def optax_optimizer(settings: dict[str, Any]) -> Any:
    """AdamW at a constant rate, after clipping by the global norm."""
    import optax

    adamw = optax.adamw(settings["lr"], 0.9, settings["b2"], 1e-8, weight_decay=settings["weight_decay"])
    return optax.chain(optax.clip_by_global_norm(settings["clip"]), adamw)


CONTESTANTS: dict[str, tuple[Contestant, Sequence[str]]] = {
    "ours": (ours, ("jax",)),
    "plain": (plain, ("jax", "flax", "optax")),
    "tunix": (tunix, ("google-tunix", "jax")),
    "trl": (trl, ("trl", "torch", "transformers")),
}


def main() -> None:
    """The worker."""
    name = sys.argv[1]
    folder = Path(sys.argv[2])
    contestant, packages = CONTESTANTS[name]
    settings = json.loads((folder / "settings.json").read_text())
    with np.load(folder / "rows.npz") as file:
        rows = dict(file)

    def emit(answer: dict[str, Any]) -> None:
        print(MARK + json.dumps(answer), flush=True)

    step = contestant(folder, rows, settings)
    emit({package: importlib.metadata.version(package) for package in packages})
    for _ in sys.stdin:
        start = time.process_time()
        loss = step()
        cpu_s = time.process_time() - start
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        emit({"loss": loss, "cpu_s": cpu_s, "peak_bytes": 1024 * peak_kib})


if __name__ == "__main__":
    main()
