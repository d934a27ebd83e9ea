"""Every field of an experiment: its type, its default and what it means.

A config file in configs/ returns an `ml_collections.ConfigDict`, which config.py builds from these
defaults, so that flags can override each field. Once it is validated (config.validate), all other code
reads it as the frozen `Settings` below.

Fields without a default here belong to the method: `METHOD` in config.py has their values, one column per
preset of ROSD, and `OTHERS` what differs in other methods. The text under a field is its documentation;
docs/fields.md is generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
TRACKERS = ("tensorboard", "wandb")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


TEMPERATURE_RULE = "be 0 (greedy) or lie in [1e-6, 1e6]"


def is_temperature(number: float) -> bool:
    """Whether a model can be sampled at it. Below and above, logits over the temperature leave float32."""
    return number == 0 or 1e-6 <= number <= 1e6


@dataclass(frozen=True)
class MeshSettings:
    """How devices are laid out. One of the three may be -1: all remaining devices."""

    data: int = 1
    """Replicas of the weights, which share the rows. With -1 on CPU, the host is split into one JAX device
    per core, if there are enough rows."""
    fsdp: int = -1
    """Devices that share the rows and split every weight."""
    tensor: int = 1
    """Devices that split attention heads, inner widths and the vocabulary; they share their rows."""


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters, trained instead of the whole model."""

    rank: int = 0
    """Rank of the adapters; 0: all weights are trained."""
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = LAYERS
    """The kernels that get an adapter. As a flag: names separated by commas."""


@dataclass(frozen=True)
class ModelSettings:
    """The model and what it costs in memory."""

    path: str = ""
    """Hugging Face directory of a Qwen3, Qwen2 or Llama model."""
    dtype: Dtype = "bfloat16"
    """Type that the model computes in. The weights that are trained are float32."""
    remat: Literal["none", "block", "attention", "offload"] = "block"
    """What the backward pass recomputes. none: nothing. block: every layer. attention: every layer except its
    attention. offload: every layer, with the layers' inputs kept in host memory."""
    frozen: Literal["device", "host"] = "device"
    """Where the frozen weights are kept. On the host they take device memory only while they are used."""
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass(frozen=True)
class DataSettings:
    """The problems."""

    max_prompt_tokens: int
    """Longest prompt of the student; longer ones are left out, and a warning names them."""
    dir: str = ""
    """Directory of the released data sets."""
    train: str = ""
    """The set to train on: a name that docs/running.md lists, or the path of a set of your own."""


@dataclass(frozen=True)
class BatchSettings:
    """One training step's batch."""

    prompts: int
    """Prompts per step."""
    samples: int
    """Rollouts per prompt, at least 2."""
    device_rows: int = 1
    """Rows per row device (data x fsdp) in one forward and backward pass."""


@dataclass(frozen=True)
class ThinkingSettings:
    """Whether the chat template opens a thinking block."""

    student: bool
    """For rollouts and evaluation."""
    reflector: bool
    """For reflections."""
    teacher: bool
    """For the teacher's scoring pass."""


@dataclass(frozen=True)
class RolloutSettings:
    """Sampling, and the KV cache that reflections and evaluation use too."""

    temperature: float
    """Above 0, because rollouts of one prompt must differ."""
    top_p: float
    """Must be 1 in training: the sampler's log-probs are those of the whole distribution."""
    max_new_tokens: int
    """Longest response."""
    stop: tuple[str, ...] = ()
    """Strings that end a response like a stop token, in evaluation too. As a flag: strings separated by
    commas, with their spaces (`a,b` is two), or Python if a string has a comma (`('a, b', 'c')`)."""
    slots: int | None = None
    """Maximum number of concurrent rollouts or reflections, over all devices, rounded up to a multiple of the
    row devices (data x fsdp); finished ones are replaced. null: all."""
    cache_tokens: int = 2**16
    """KV cache capacity for response tokens, per row device (data x fsdp), in evaluation too. When it is
    full, responses queue; the newest may be preempted and is later regenerated with the same random numbers.
    The default is a quarter of what 32 rollouts of 8192 tokens need."""
    prompt_tokens: int = 2**16
    """KV cache capacity for the tokens of distinct prompts, per row device; larger batches are split."""
    attention: Literal["xla", "ragged_tpu", "pallas_tpu", "pallas_gpu"] | None = None
    """Implementation of attention in decoding; null: the best one for the platform."""


@dataclass(frozen=True)
class ReflectSettings:
    """The reflector: which rollouts it reads, and how it answers."""

    weights: Literal["frozen", "student"]
    """frozen: the initial model. student: the current one."""
    temperature: float
    """0: greedy."""
    max_prompt_tokens: int
    """Longest prompt of the reflector."""
    max_new_tokens: int
    """Longest reflection."""
    overlong: Literal["skip", "cut"]
    """If a reflector prompt is too long. skip: the rollout leaves the loss. cut: the prompt is cut."""
    solution: Literal["shortest", "first"]
    """Which correct rollout of the group the reflector sees, or the teacher."""
    correct: bool
    """Whether correct rollouts are reflected and taught too."""
    uniform_groups: bool
    """Whether groups that are all wrong or all correct are reflected too."""


@dataclass(frozen=True)
class LessonSettings:
    """Which tokens are in the loss, and what the teacher sees."""

    region: Literal["span", "suffix", "full", "inverted"]
    """The tokens of a wrong rollout in the loss. span: the quoted error only. suffix: from the error to
    the end. full: all. inverted: all but the quoted error, for ablations."""
    quote_missing: Literal["skip", "full"]
    """If the quote is not found. skip: the rollout leaves the loss. full: all its tokens are in the loss."""
    locate: Literal["offsets", "reencode"]
    """How a place in the text is mapped to tokens. offsets: by the offsets of the sampled tokens. reencode:
    by tokenizing the text before it again, as the released code does."""
    teacher_context: Literal["idea", "idea_or_solution", "solution", "none"]
    """What the teacher sees in addition to the problem. solution: a correct rollout of the group; with
    lesson.region=full nothing is reflected then. none: there is no reflector, no teacher and no
    distillation."""
    gold_in_idea: Literal["keep", "strip"]
    """If an idea gives the gold answer away. keep: it is used. strip: the answer is removed from it."""
    max_teacher_tokens: int
    """Longest prompt of the teacher."""
    teacher_weights: Literal["frozen", "ema"]
    """frozen: the initial model teaches. ema: an exponential moving average of the student's weights does."""
    ema_rate: float
    """Share of the way to the student's weights that the average moves after every optimizer step."""
    uniform_groups: bool
    """Whether groups that are all correct are taught too."""


@dataclass(frozen=True)
class AblationSettings:
    """What is put in place of the reflector's work, to see what it is worth. The defaults replace nothing."""

    moved_spans: float = 0.0
    """Share of the located error spans that are moved to a random place of their response, with their
    number of tokens."""
    swapped_ideas: float = 0.0
    """Share of the ideas for which the teacher sees the idea of another problem of the batch."""
    oracle_spans: bool = False
    """Whether the span of a wrong rollout is its true first error, which only the gym knows."""
    oracle_ideas: bool = False
    """Whether the idea for a wrong rollout is the true right line, which only the gym knows."""


@dataclass(frozen=True)
class LossSettings:
    """The divergence between student and teacher."""

    topk: int
    """Number of the student's most likely tokens that are compared one by one."""
    alpha: float
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence."""
    tail: Literal["bucket", "renorm"]
    """The rest of the vocabulary: one more bucket, or left out and the top k renormalised."""
    ratio_cap: float
    """Largest importance weight, exp(trainer's log-prob - sampler's log-prob)."""
    chunk: int = 1024
    """Tokens whose logits are in memory at the same time."""


@dataclass(frozen=True)
class PolicySettings:
    """The policy gradient: rollouts are reinforced by their rewards. docs/methods.md has the formulas."""

    advantage: Literal["none", "std", "mean"]
    """A rollout's advantage, from the rewards of its prompt's rollouts. none: there is no policy gradient.
    mean: reward - mean. std: (reward - mean) / (standard deviation + 1e-6)."""
    normalise: Literal["sequence", "constant", "token"]
    """What the loss is a mean over. token: all response tokens of the batch. sequence: the responses, after a
    mean over the tokens of each. constant: as many tokens as if each response had rollout.max_new_tokens."""
    weight: float
    """Factor of the policy gradient's loss, which is added to that of the distillation."""
    rows: Literal["all", "untaught"]
    """Which rollouts it reinforces. untaught: those that no teacher teaches."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW after clipping by the global norm."""

    lr: float
    """Learning rate after the warm-up."""
    warmup_steps: int
    """Steps of linear warm-up."""
    warmup_from_zero: bool
    """Whether the first step has rate 0, as in the released code."""
    b1: float
    """Decay of the first moment."""
    b2: float
    """Decay of the second moment."""
    eps: float
    """Added to the root of the second moment."""
    weight_decay: float
    """Decoupled weight decay."""
    clip_norm: float
    """Largest global norm of the gradient."""
    empty_batch: Literal["skip", "step"]
    """If no token is active. skip: no step. step: a step of weight decay and momentum only."""
    mu_dtype: Dtype = "float32"
    """Type of AdamW's first moment."""
    grad_dtype: Dtype = "float32"
    """Type of the accumulated gradient."""


@dataclass(frozen=True)
class ValidationSettings:
    """The split that chooses the best step; it is neither trained on nor reported."""

    sets: str = ""
    """Sets whose mean avg@k chooses the best step, separated by commas; empty: no step is chosen."""
    every: int = 10
    """Steps between validations; 0: only before the first step and after the last."""


@dataclass(frozen=True)
class EvalSettings:
    """What is evaluated before, during and after training."""

    sets: str = ""
    """Sets, separated by commas."""
    samples: int = 16
    """Responses per problem."""
    limit: int = 0
    """Problems per set; 0: all."""
    every: int = 10
    """Steps between evaluations; 0: only before the first step and after the last."""
    batch: int = 256
    """Maximum number of concurrent responses, over all devices; finished ones are replaced."""
    temperature: float = 0.6
    """0: greedy."""
    top_p: float = 0.95
    """Probability mass that is sampled from (nucleus sampling)."""
    max_new_tokens: int = 8192
    """Longest response."""


@dataclass(frozen=True)
class CheckpointSettings:
    """When the state is saved."""

    every: int = 10
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep. The step that validation chose is kept in addition."""


@dataclass(frozen=True)
class GuardSettings:
    """When a run that collapses ends by itself: a share of the highest mean of five steps, below which the
    mean of the last five steps must not fall. 0: never."""

    reward: float = 0.0
    """Share that the reward must keep."""
    entropy: float = 0.0
    """Share that the entropy must keep."""
    length: float = 0.0
    """Share that the response length must keep."""


@dataclass(frozen=True)
class Settings:
    """One experiment."""

    rewards: str
    """The checkers: fixed, official (as the released code grades), or MODULE:FUNCTION of your own."""
    method: Literal["rosd", "sdpo", "grpo", "dr_grpo", "dapo_loss", "grpo_strong", "rosd_grpo"]
    """Name of the method, which runs record. A preset sets it together with the fields of the method."""
    mesh: MeshSettings
    model: ModelSettings
    data: DataSettings
    batch: BatchSettings
    thinking: ThinkingSettings
    rollout: RolloutSettings
    reflect: ReflectSettings
    lesson: LessonSettings
    ablation: AblationSettings
    loss: LossSettings
    policy: PolicySettings
    optimizer: OptimizerSettings
    validation: ValidationSettings
    eval: EvalSettings
    checkpoint: CheckpointSettings
    guard: GuardSettings
    name: str = ""
    """Name of the experiment; the default workdir begins with it."""
    seed: int = 0
    """Seed of the order of problems, of sampling and of adapters."""
    steps: int = 100
    """Total number of training steps."""
    wording: str = "english"
    """Texts of the prompts: english, gym (the shipped tiny model's vocabulary), or PATH.toml of your own."""
    reward_timeout: float = 5.0
    """CPU seconds to grade one response; one that takes longer scores 0."""
    compile_cache: str = "~/.cache/rosd_jax/compiled"
    """Directory in which compiled programs are cached for later starts; empty: no cache."""
    trackers: tuple[str, ...] = ()
    """Where the numbers of metrics.jsonl are also sent: tensorboard, wandb. As a flag: names separated by
    commas."""

    @property
    def rows(self) -> int:
        """Rollouts in one step."""
        return self.batch.prompts * self.batch.samples

    @property
    def distills(self) -> bool:
        """Whether the method has a teacher."""
        return self.lesson.teacher_context != "none"

    @property
    def reflects(self) -> bool:
        """Whether the method has a reflector: not if a teacher sees solutions only and teaches all tokens."""
        lesson = self.lesson
        return self.distills and (lesson.teacher_context != "solution" or lesson.region != "full")

    @property
    def averages(self) -> bool:
        """Whether a moving average of the student's weights teaches, not the frozen model."""
        return self.lesson.teacher_weights == "ema"

    @property
    def reinforces(self) -> bool:
        """Whether the method has a policy gradient."""
        return self.policy.advantage != "none"
