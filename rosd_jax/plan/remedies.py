"""What to change if a run does not fit, by arithmetic.

changes(trial, stage)   -> fields that make one stage smaller, each alone
remedies(trial)         -> whether all of them together make it fit; if not, what does
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any

import jax

from rosd_jax.errors import UserError
from rosd_jax.fields import replace, value
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.plan.chips import Slice, slice_name
from rosd_jax.plan.stages import make_job, stages
from rosd_jax.rollout.stops import Stops
from rosd_jax.settings import Settings
from rosd_jax.train.inputs import check_lengths

Totals = dict[str, int]  # bytes per chip of each stage

# Fields that save memory, and the value that is tried for each if a stage does not fit.
LEVERS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("batch.device_rows", lambda n: 1),
    ("model.remat", lambda remat: "block"),
    ("model.remat", lambda remat: "offload"),
    ("model.frozen", lambda where: "host"),
    ("optimizer.grad_dtype", lambda dtype: "bfloat16"),
    ("optimizer.mu_dtype", lambda dtype: "bfloat16"),
    ("loss.chunk", lambda n: max(128, n // 2)),
    ("rollout.cache_tokens", lambda n: n // 2),
    ("rollout.prompt_tokens", lambda n: n // 2),
    ("mesh.tensor", lambda n: 2 * n),
)
RANK = 64  # of the adapters that are tried
TENSOR = (1, 2, 4, 8)  # mesh.tensor that is tried on other slices
SPARE = 0.05  # share of a chip's memory that another slice must leave free, since bytes are estimates


@dataclass(frozen=True)
class Trial:
    """A run whose fields are changed to see what it takes."""

    config: Settings
    model: Qwen3Config
    chips: Slice
    stop_ids: tuple[int, ...]
    stops: Stops | None
    evaluated: int  # items of the largest evaluation set

    @property
    def limit(self) -> int:
        """Bytes of one chip."""
        assert self.chips.chip is not None
        return self.chips.chip.memory

    def totals(self, config: Settings, chips: Slice | None = None) -> Totals:
        """What every stage takes with that config. Raises UserError if the config breaks a rule."""
        model = self.model.replace(remat=config.model.remat)
        check_lengths(config, model)
        job = make_job(config, model, chips or self.chips)
        found = stages(job, self.stop_ids, self.stops, self.evaluated)
        return {stage.name: sum(stage.bytes.values()) for stage in found}

    def excess(self, totals: Totals) -> int:
        """Bytes per chip that the stages lack, added up over the stages; 0 if they fit."""
        return sum(max(0, total - self.limit) for total in totals.values())

    def used(self, totals: Totals) -> str:
        """The largest stage against the chip's memory."""
        name = max(totals, key=lambda stage: totals[stage])
        return f"{name} takes {totals[name] / 1e9:.1f} of {self.limit / 1e9:.1f} GB"


def changes(trial: Trial, stage: str) -> tuple[str, ...]:
    """Fields to change, one sentence each: those that make the stage smaller, the best first.

    Each change is tried alone.
    """
    before = trial.totals(trial.config)[stage]
    found: list[tuple[int, str]] = []
    for field, config, totals in _tried(trial, trial.config):
        after = totals[stage]
        if after < before:
            gain = f"{stage} takes {after / 1e9:.1f} GB per chip instead of {before / 1e9:.1f}"
            found.append((after, f"{field} to {value(config, field)}: {gain}"))
    return tuple(sentence for _, sentence in sorted(found))


def remedies(trial: Trial) -> tuple[str, ...]:
    """Whether several changes together make the run fit; if not, adapters or a slice that do."""
    if not trial.excess(trial.totals(trial.config)):
        return ("by arithmetic it fits, so only the compiler can tell which changes suffice",)
    together, sentence = _together(trial)
    if not trial.excess(trial.totals(together)):
        return (sentence,)
    found = [s for s in (_adapters(trial, together), _larger_slice(trial)) if s]
    if found:
        return (sentence, *found)
    untried = "; a --topology tries larger slices" if trial.chips.name == "local" else ""
    return sentence, f"no change that was tried makes it fit{untried}"


def _together(trial: Trial) -> tuple[Settings, str]:
    """The config with every change that helps, the best first, until it fits; and a sentence about it."""
    config = trial.config
    totals = trial.totals(config)
    fields: dict[str, Any] = {}
    while trial.excess(totals):
        tried = [found for found in _tried(trial, config) if found[0] not in fields]
        if not tried:
            break
        field, changed, after = min(tried, key=lambda found: trial.excess(found[2]))
        if trial.excess(after) >= trial.excess(totals):
            break
        config = changed
        totals = after
        fields[field] = value(config, field)
    named = " ".join(f"{field}={new}" for field, new in fields.items())
    if not trial.excess(totals):
        return config, f"it fits with {named}: {trial.used(totals)}"
    if not fields:
        return config, "no field that saves memory helps"
    return config, f"all changes together do not suffice: with {named} {trial.used(totals)}"


def _adapters(trial: Trial, together: Settings) -> str:
    """Whether adapters make it fit, alone or with the other changes; empty if not."""
    if trial.config.model.lora.rank:
        return ""
    for config, others in ((trial.config, ""), (together, " and these changes")):
        totals = trial.totals(replace(config, "model.lora.rank", RANK))
        if not trial.excess(totals):
            return (
                f"with model.lora.rank={RANK}{others} it fits, but then adapters are trained instead of all "
                f"weights: {trial.used(totals)}"
            )
    return ""


def _larger_slice(trial: Trial) -> str:
    """The smallest slice of these chips on which it fits with no other change; empty if none was found."""
    for chips in _slices(trial.chips):
        for tensor in TENSOR:
            fsdp = len(chips.devices) // tensor
            mesh = with_fields(trial.config.mesh, data=1, fsdp=fsdp, tensor=tensor)
            try:
                totals = trial.totals(with_fields(trial.config, mesh=mesh), chips)
            except UserError:  # that mesh does not fit the slice, the model or the batch
                continue
            if max(totals.values()) <= (1 - SPARE) * trial.limit:
                return (
                    f"the smallest slice that suffices, with {100 * SPARE:.0f} % to spare, is "
                    f"--topology={chips.name} with mesh.data=1 mesh.fsdp={fsdp} mesh.tensor={tensor}: "
                    f"{trial.used(totals)}"
                )
    return ""


def _slices(chips: Slice) -> Iterator[Slice]:
    """Slices of these chips, from that size up, as far as there are CPU devices to represent them."""
    assert chips.chip is not None
    stand_ins = jax.devices("cpu")
    for power in range(len(stand_ins).bit_length()):
        count = 2**power
        name = slice_name(chips.chip, count)
        if name and count >= len(chips.devices):
            yield Slice(name, chips.chip, stand_ins[:count], chips.platform, compiles=False)


def _tried(trial: Trial, config: Settings) -> Iterator[tuple[str, Settings, Totals]]:
    """Each field that can be changed, the config with that one change, and what it then takes."""
    for field, change in LEVERS:
        new = change(value(config, field))
        if new == value(config, field):
            continue
        changed = replace(config, field, new)
        if field == "mesh.tensor" and changed.mesh.data != -1:  # more tensor devices leave fewer row devices
            changed = replace(changed, "mesh.fsdp", -1)
        try:
            totals = trial.totals(changed)
        except UserError:  # the change would break another rule
            continue
        yield field, changed, totals
