"""Every key of a run's configuration: its type, default, unit and one line of help.

`python launch/pretrain.py --help-config` prints this file as a table. Rules that need more than
one key stand in `configs/checks.py`, reading and overriding in `configs/loading.py`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from l2e.config import L2EConfig
from l2e.problems import ConfigError, Problem
from model.config import ModelConfig


class Section(BaseModel):
    """One section of the file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def key(default: Any, help: str, unit: str = "", **bounds: Any) -> Any:
    """A configuration key with its default, its help line and the unit of its value."""
    return Field(default, description=help, json_schema_extra={"unit": unit}, **bounds)


def read_l2e(given: object) -> object:
    """The method's own configuration from its section; it checks its keys itself.

    Raises ConfigError that lists every mistake.
    """
    if not isinstance(given, dict):
        return given
    known = {field.name for field in fields(L2EConfig)}
    problems = [Problem(key, given[key], "unknown key", "") for key in given if key not in known]
    try:
        config = L2EConfig(**{key: given[key] for key in given if key in known})
    except ConfigError as report:
        problems += report.problems
    if problems:
        raise ConfigError("l2e", problems)
    return config


class Monitor(Section):
    """What watches the method at work while the model trains."""

    features: str | None = key(
        None,
        "feature passages (.jsonl or .jsonl.gz) on which scale and fkr are measured in training",
    )
    interval: int = key(
        0,
        "steps between these; 0: 100 or more, for at most 1 % of the time; always at the end",
        "steps",
        ge=0,
    )
    passages: int = key(8, "passages of each feature that are measured", "passages", ge=1)
    tokens: int = key(64, "tokens of each passage that are measured", "tokens", ge=2)


class Data(Section):
    """Where the tokens come from and in which order they are read."""

    path: str | list[str] | dict[str, float] | None = key(
        None,
        "prefix of a prepared .bin/.idx pair; a list of prefixes, blended by their tokens; a map "
        "of prefix to weight; hf:owner/name@revision, token files on the Hugging Face hub; or "
        "builtin, Python's own standard library, prepared at the start: needs no download",
    )
    validation_path: str | None = key(
        None, "prefix of the validation set; without one, the end of the training set is held out"
    )
    validation_fraction: float = key(
        0.01, "share of documents held out where there is no validation_path", ge=0, lt=1
    )
    sequence_length: int = key(2048, "tokens a training sequence predicts", "tokens", ge=1)
    order: Literal["neox", "megatron", "preshuffled"] = key(
        "neox",
        "sample order: gpt-neox v1.0's, megatron-core's, or rows of Pythia's preshuffled files",
    )
    cache_dir: str | None = key(
        None,
        "folder of the index maps, and of data that is fetched or built in; default: in the run's",
    )


class Tokenizer(Section):
    """The tokenizer the corpus was prepared with."""

    path: str | None = key(
        None,
        "tokenizer.json (Hugging Face), .model (sentencepiece) or hf:owner/name@revision; default: "
        "the one the corpus was prepared with",
    )
    vocab_size: int = key(
        4096, "size of the sentencepiece model trained for data.path builtin", "tokens", ge=300
    )


Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class Optimizer(Section):
    """The update rule. Biases and LayerNorms are never decayed."""

    type: Literal["adamw", "sgd"] = key("adamw", "adamw as Pythia's, or plain sgd (parity tests)")
    learning_rate: float = key(1e-3, "peak learning rate", ge=0, le=1000)
    betas: tuple[Beta, Beta] = key((0.9, 0.95), "AdamW's decay of its moments", strict=False)
    eps: float = key(1e-8, "AdamW's epsilon", ge=1e-30, le=1)
    weight_decay: float = key(0.1, "decoupled weight decay", ge=0, le=1000)
    gradient_clipping: float = key(1.0, "largest global gradient norm; 0 clips nothing", ge=0)


class Schedule(Section):
    """The learning rate over steps."""

    type: Literal["neox_v1", "neox", "constant"] = key(
        "neox_v1",
        "neox_v1: cosine with a floor as Pythia was trained; neox: today's, which reaches the "
        "floor at decay_steps; constant after warm-up",
    )
    warmup_steps: int = key(1430, "steps of linear warm-up from 0", "steps", ge=0)
    decay_steps: int | None = key(None, "length of the cosine; default: train.steps", "steps", ge=1)
    floor_ratio: float = key(0.1, "least learning rate as a share of the peak", ge=0, le=1)


class Parallel(Section):
    """How one model is spread over processes; what is left over is data parallel."""

    tensor: int = key(1, "tensor-parallel size: one layer's matrices are split", "ranks", ge=1)
    pipeline: int = key(1, "pipeline-parallel size: blocks are split", "stages", ge=1)
    sequence: bool = key(False, "sequence parallelism beside tensor parallelism (CUDA only)")
    processes: int | None = key(
        None,
        "processes (GPUs) the batch sizes are meant for; --dry-run plans for it",
        "ranks",
        ge=1,
    )
    activation_checkpointing: bool = key(
        False, "recompute each block's activations in the backward pass: less memory, more time"
    )
    join_timeout: int = key(
        1800, "how long the ranks wait for each other at the start of a run", "seconds", ge=1
    )
    step_timeout: int = key(
        600,
        "how long a step may take, or a rank be silent, before all ranks show where they stand and "
        "the run ends; saves, evaluations and the first step may take four times as long",
        "seconds",
        ge=1,
    )


class Train(Section):
    """The run itself."""

    steps: int = key(143000, "optimizer steps of the run", "steps", ge=1)
    seed: int = key(1234, "seed of the initial weights and of the data order", ge=0, lt=2**32)
    global_batch_size: int = key(1024, "sequences an optimizer step", "sequences", ge=1)
    micro_batch_size: int = key(
        1, "sequences a process runs at once; the rest is accumulated", "sequences", ge=1
    )
    dtype: Literal["fp32", "bf16", "fp16"] = key(
        "bf16", "the model's precision; master weights and gradient sums are always fp32"
    )
    compile: bool | Literal["auto"] = key(
        "auto",
        "torch.compile each block, with tensor and pipeline parallel sizes of 1 and ZeRO 0 to 2; "
        "auto: on a GPU, and a line that says where not and why",
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = key(
        "stop",
        "after a step whose loss or gradient is not finite, and whose update is never made: stop "
        "the run, skip the step and count it, or go back to the newest checkpoint and on with the "
        "data after that step",
    )
    nonfinite_limit: int = key(
        10, "such steps in a row, or such ways back, after which the run stops", "steps", ge=1
    )
    spike_threshold: float = key(
        8.0,
        "how far above the median of the last 128 losses a step's counts as a spike, which is told "
        "with its batch and subsets; 0: none",
        "standard deviations, by the median distance",
        ge=0,
    )
    on_spike: Literal["log", "rollback"] = key(
        "log",
        "after a spike go on, or go back to the newest checkpoint and on with the data after that "
        "step",
    )
    stop_after: int | None = key(
        None, "stop cleanly after this step, the schedule unchanged", "steps", ge=1
    )


class Checkpoint(Section):
    """When state is written and what is kept."""

    interval: int = key(
        1000, "steps between checkpoints; 0 writes the last one only", "steps", ge=0
    )
    keep_last: int = key(3, "newest checkpoints that are kept; 0 keeps all", "checkpoints", ge=0)
    keep_every: int = key(0, "steps whose multiples are kept for good; 0: none", "steps", ge=0)
    steps: list[Annotated[int, Field(ge=0)]] = key(
        [], "further steps that are written and kept for good; 0 is the untrained model", "steps"
    )
    give_up: int = key(
        2000,
        "a checkpoint that cannot be written is told and the next one tried; after so many steps "
        "without any the run stops",
        "steps",
        ge=0,
    )
    background: bool | None = key(
        None,
        "write while training goes on, from a copy in the host's memory; default: on a GPU, where "
        "the state itself lies elsewhere",
    )


class Evaluate(Section):
    """Validation and downstream scores during training."""

    interval: int = key(1000, "steps between validation losses; 0: at the end only", "steps", ge=0)
    batches: int = key(10, "global batches of the validation loss", "batches", ge=1)
    layer_worth: bool = key(
        False,
        "at the end, also how much the validation loss rises without the MLP of each inhibited "
        "block, and without all of these",
    )
    tasks: list[str] = key(
        [],
        "lm-evaluation-harness tasks or suites (pythia, l2e) that are scored during training",
    )
    task_interval: int = key(0, "steps between these scores; 0: at the end only", "steps", ge=0)
    task_data: str | None = key(
        None, "folder of the tasks' TASK_SPLIT.jsonl(.gz) files; default: the Hugging Face hub"
    )
    task_limit: int | None = key(None, "items of each task; default: all", "items", ge=1)
    shots: int = key(0, "examples before each item", ge=0)


class Logging(Section):
    """What is written while training runs."""

    interval: int = key(10, "steps between lines that are fetched from the device", "steps", ge=1)
    tensorboard: bool = key(True, "write TensorBoard events beside metrics.jsonl")


class Config(Section):
    """A whole run."""

    model: ModelConfig = Field(description="the GPT-NeoX model")
    l2e: Annotated[L2EConfig, BeforeValidator(read_l2e)] = Field(
        default_factory=L2EConfig, description="monosemantic neurons"
    )
    monitor: Monitor = Field(default_factory=Monitor, description="measurements in training")
    data: Data = Field(default_factory=Data, description="the corpus")
    tokenizer: Tokenizer = Field(default_factory=Tokenizer, description="its tokenizer")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="the update rule")
    schedule: Schedule = Field(default_factory=Schedule, description="the learning rate")
    parallel: Parallel = Field(default_factory=Parallel, description="the layout")
    train: Train = Field(default_factory=Train, description="the run")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="saved state")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="validation")
    logging: Logging = Field(default_factory=Logging, description="logs")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed's own configuration, passed on; batch sizes, precision, clipping "
        "and optimizer are filled in from the sections above",
    )

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 1 where the file names none."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 1))
