"""The thin adapter between the training loop and DeepSpeed: one optimizer step, in any layout.

DeepSpeed's engines differ between a whole model (ZeRO 0-3) and a pipeline (ZeRO-1). `build` hides
that: what comes back takes a step's micro-batches and a learning rate, and has the same few
attributes in every layout.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs import Config
from l2e import Controller, L2ELayer, Sharding
from launch.engine.compiling import compile_as_asked, uncompiled
from launch.engine.copies import watch_copies
from launch.engine.layout import Layout, initialise_layout
from launch.engine.profiling import Stopwatch
from model.block import Block
from model.gpt_neox import GPTNeoX
from model.linears import reduce_sequence_parallel_gradients
from model.pipeline import pipeline_layers, pipeline_loss

# Read by DeepSpeed when it is imported, which otherwise guesses aloud.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


class ModelParallelUnit:
    """What a DeepSpeed engine asks about the layout when it gets the whole model."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def get_model_parallel_rank(self) -> int:
        return self.layout.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.layout.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.layout.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.layout.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.layout.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.layout.data_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the CPU op that it would compile on first use."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # The shared-memory all-reduce takes 30 s to compile and a compiler; gloo serves as well.
        # The table is probed lazily (with compiler runs), so an empty one is "no compiled op".
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed()  # wraps torch.distributed's group, which is there already
    return deepspeed


def deepspeed_config(config: Config, layout: Layout) -> dict[str, Any]:
    """The user's DeepSpeed section with batch sizes, precision and clipping filled in."""
    train = config.train
    settings = dict(config.deepspeed)
    settings["zero_optimization"] = {"stage": 1, **settings.get("zero_optimization", {})}
    # The default is the model's own dtype: each rank's gradients would be rounded before their sum.
    settings.setdefault("communication_data_type", "fp32")
    settings |= {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, layout),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": None,
        # It would wait for the GPU twice a micro-batch.
        "timers": {"throughput": {"enabled": False}} | settings.get("timers", {}),
        # The optimizer is ours, plain torch: DeepSpeed must neither refuse nor replace it.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The default is the model's own dtype, and bf16 gradients would add up in bf16.
        "data_types": {"grad_accum_dtype": "fp32", **settings.get("data_types", {})},
    }
    if train.dtype == "bf16":
        # Gradients join the fp32 sums as they arise. Otherwise a pipeline's last stage clears the
        # output embedding's, which the loss function makes before the stage's backward begins.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if train.dtype == "fp16":  # Pythia's dynamic loss scale
        scale = {"initial_scale_power": 12, "loss_scale_window": 1000, "hysteresis": 2}
        settings["fp16"] = scale | {"min_loss_scale": 1} | settings.get("fp16", {})
        settings["fp16"]["enabled"] = True
    return settings


def accumulation_steps(config: Config, layout: Layout) -> int:
    """Micro-batches that each data-parallel rank runs in an optimizer step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * layout.data_size)


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups: matrices decay, biases and LayerNorms don't.

    Fused, so that a step can be dropped on the device (`found_inf`).
    """
    settings = config.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.type == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, fused=True)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


class Engine:
    """One model in training: what the loop, the checkpoint and the evaluation see of DeepSpeed."""

    def __init__(self, config: Config, layout: Layout, model: nn.Module, device: torch.device):
        self.config = config
        self.layout = layout
        self.model = model
        self.device = device
        self.accumulation = accumulation_steps(config, layout)
        self.controller = self.build_controller()
        self.stopwatch = Stopwatch(device)
        self.compiled = compile_as_asked(model, config, device)
        reduce_sequence_parallel_gradients(model)
        watch_copies(dict(self.named_parameters()), layout)

    def build_controller(self) -> Controller | None:
        """The keeper of this process's inhibited layers, if it has any."""
        layers = [module for module in self.model.modules() if isinstance(module, L2ELayer)]
        if not layers:
            return None
        for layer in layers:  # before the first compiled call, which would be of another device
            layer.state.to(self.device)
        sharding = Sharding(self.layout.data_group, self.layout.tensor_group)
        return Controller(layers, self.config.l2e, sharding)

    def initialise(self, **options: Any) -> None:
        """Hand the model to DeepSpeed."""
        deepspeed = import_deepspeed()
        with redirect_stdout(io.StringIO()):  # some of its optimizers print their memory use
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=build_optimizer(self.config, self.model),
                config=deepspeed_config(self.config, self.layout),
                dist_init_required=False,
                **options,
            )

    def measure(self, on: bool) -> None:
        """Whether the next step also gathers what only logs need: kurtosis, maxima, histograms."""
        if self.controller is not None:
            self.controller.measure = on

    def wait(self) -> None:
        """Until the device has done all that it was asked to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ms_loss(self) -> Tensor:
        """L_MS of the last step, over the inhibited layers of this process."""
        if self.controller is None:
            return torch.zeros((), device=self.device)
        return self.controller.ms_loss()

    def l2e_bad_steps(self) -> dict[str, int]:
        """{block number: its last step with activations that are not finite}, each told once."""
        bad = {} if self.controller is None else self.controller.bad_steps()
        return self.of_all_stages({name: step + 1 for name, step in bad.items()})

    def l2e_metrics(self) -> dict[str, dict[str, float]]:
        """The inhibited layers' metrics by block number, of all pipeline stages."""
        return self.of_all_stages({} if self.controller is None else self.controller.metrics())

    def l2e_histograms(self) -> dict[str, Tensor]:
        """Counts of the Monosemantic Scale by block number, of the last measured step."""
        return self.of_all_stages({} if self.controller is None else self.controller.histograms())

    def of_all_stages(self, own: dict[str, Any]) -> dict[str, Any]:
        """The tables of all pipeline stages in one."""
        if self.layout.pipeline_size == 1:
            return own
        stages: list[dict[str, Any]] = [{}] * self.layout.pipeline_size
        dist.all_gather_object(stages, own, group=self.layout.pipeline_group)
        return {name: value for stage in stages for name, value in stage.items()}

    @property
    def loss_scale(self) -> float:
        """fp16's dynamic loss scale; 1 in fp32 and bf16."""
        return float(getattr(self.optimizer, "loss_scale", 1.0))

    def train_step(self, batches: Iterator[Tensor], learning_rate: float) -> Tensor:
        """One optimizer step; the mean language-model loss of the global batch (nats/token).

        batches: yields this rank's micro-batches, [micro_batch, sequence_length + 1] tokens.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.controller is not None:
            # L_MS is injected as a gradient: DeepSpeed scales the loss, this scales the injection.
            self.controller.gradient_scale = self.loss_scale / self.accumulation
        loss = self.forward_backward_step(batches)
        if self.controller is not None:
            self.controller.step()
        return loss

    def split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each [micro_batch, sequence_length], on the device."""
        batch = batch.to(self.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def forward_backward_step(self, batches: Iterator[Tensor]) -> Tensor:
        """Accumulate the global batch's gradients, update, and return its mean loss."""
        raise NotImplementedError

    def evaluate(self, batches: Iterator[Tensor], count: int) -> Tensor:
        """The mean loss over `count` global batches (nats/token); every L2E layer is off."""
        raise NotImplementedError

    def observe(self, tokens: Tensor, hook: Callable[[str, Tensor], None]) -> None:
        """Run the model without gradients and show its neurons' activations; L2E layers are off.

        tokens: [micro_batch, length]. hook(block number, activations): of each block of this
        process, [micro_batch, length, this rank's neurons].
        """
        raise NotImplementedError

    @contextmanager
    def watching(self, hook: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Show what the blocks compute inside to `hook`."""
        with ExitStack() as hooks, uncompiled(), torch.no_grad():
            for block in self.blocks():
                shown = partial(hook, str(block.number))
                hooks.enter_context(
                    block.mlp.dense_4h_to_h.register_forward_pre_hook(
                        lambda _, inputs, shown=shown: shown(inputs[0].transpose(0, 1))
                    )
                )
            yield

    @contextmanager
    def without_mlps(self, numbers: set[int]) -> Iterator[None]:
        """The model with the MLPs of some blocks taken out: they add nothing to the residual."""
        with ExitStack() as hooks, uncompiled():
            for block in self.blocks():
                if block.number in numbers:
                    hooks.enter_context(
                        block.mlp.register_forward_hook(
                            lambda _, inputs, output: torch.zeros_like(output)
                        )
                    )
            yield

    def blocks(self) -> Iterator[Block]:
        """The model's blocks that this process holds."""
        return (module for module in self.model.modules() if isinstance(module, Block))

    def gather_neurons(self, values: Tensor) -> Tensor:
        """[..., this rank's neurons] -> [..., all neurons of the layer]."""
        return Sharding(tensor_group=self.layout.tensor_group).gather_neurons(values)

    def gradient_norm(self) -> float | Tensor | None:
        """The global gradient norm of the last step, before clipping."""
        return self.deepspeed.get_global_grad_norm()

    @property
    def dropped_update(self) -> bool:
        """Whether the last step's gradients were not finite, so far as the host knows already."""
        return bool(getattr(self.optimizer, "overflow", False))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This process's parameters under their canonical (Hugging Face) names."""
        return self.model.named_parameters()


class WholeModelEngine(Engine):
    """Every process holds the whole depth of the model: ZeRO 0 to 3, with tensor parallelism."""

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        model = GPTNeoX(
            config.model,
            config.l2e,
            seed=config.train.seed,
            sequence_parallel=config.parallel.sequence,
            activation_checkpointing=config.parallel.activation_checkpointing,
        ).to(device)
        super().__init__(config, layout, model, device)
        self.initialise(mpu=ModelParallelUnit(layout))
        # Plain torch optimizers (fp32 at ZeRO-0) keep no gradient norm; it is taken here.
        self.takes_norm = isinstance(self.optimizer, torch.optim.Optimizer)
        self.norm: Tensor | None = None

    def forward_backward_step(self, batches: Iterator[Tensor]) -> Tensor:
        self.deepspeed.train()
        total = torch.zeros((), device=self.device)
        for _ in range(self.accumulation):
            with self.stopwatch.part("data"):
                tokens, labels = self.split(next(batches))
            with self.stopwatch.part("forward"):
                loss = self.deepspeed(tokens, labels)
            with self.stopwatch.part("backward"):
                self.deepspeed.backward(loss)
            total += loss.detach().float()
            with self.stopwatch.part("update"):
                if self.takes_norm and self.deepspeed.is_gradient_accumulation_boundary():
                    self.norm = self.norm_of_gradients()
                    self.optimizer.found_inf = (~torch.isfinite(self.norm)).float()
                self.deepspeed.step()
        return self.mean_over_data(total / self.accumulation)

    def mean_over_data(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the data-parallel ranks."""
        dist.all_reduce(value, group=self.layout.data_group)
        return value / self.layout.data_size

    def norm_of_gradients(self) -> Tensor:
        """The 2-norm of all gradients; what tensor-parallel ranks hold alike counts once."""
        squares = torch.zeros((), device=self.device)
        for parameter in self.model.parameters():
            sharded = getattr(parameter, "tensor_model_parallel", False)
            if parameter.grad is not None and (sharded or self.layout.tensor_rank == 0):
                squares += parameter.grad.float().square().sum()
        dist.all_reduce(squares, group=self.layout.tensor_group)
        return squares.sqrt()

    def gradient_norm(self) -> float | Tensor | None:
        return self.norm if self.takes_norm else super().gradient_norm()

    @property
    def dropped_update(self) -> bool:
        if self.norm is not None and self.norm.device.type == "cpu":
            return not math.isfinite(self.norm)
        return super().dropped_update

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Tensor], count: int) -> Tensor:
        self.deepspeed.eval()
        total = torch.zeros((), device=self.device)
        micro_batches = count * self.accumulation
        for _ in range(micro_batches):
            total += self.deepspeed(*self.split(next(batches))).float()
        return self.mean_over_data(total / micro_batches)

    def observe(self, tokens: Tensor, hook: Callable[[str, Tensor], None]) -> None:
        self.deepspeed.eval()
        with self.watching(hook):
            self.model.get_submodule("gpt_neox")(
                tokens.to(self.device)
            )  # the logits are not wanted


class PipelineEngine(Engine):
    """Each process holds one stage of the model: ZeRO-1, with tensor and data parallelism."""

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        import_deepspeed()
        from deepspeed.pipe import LayerSpec, PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        self.pieces = pipeline_layers(
            config.model,
            config.l2e,
            seed=config.train.seed,
            sequence_parallel=config.parallel.sequence,
        )
        model = PipelineModule(
            [LayerSpec(piece.kind, *piece.args, **piece.kwargs) for piece in self.pieces],
            loss_fn=pipeline_loss,
            topology=PipeModelDataParallelTopology(
                num_pp=layout.pipeline_size, num_mp=layout.tensor_size, num_dp=layout.data_size
            ),
            partition_method=f"type:{Block.__name__}",
            # DeepSpeed would checkpoint the embedding too, whose integer input has no gradient.
            checkpointable_layers=[Block.__name__],
            activation_checkpoint_interval=int(config.parallel.activation_checkpointing),
        ).to(device)
        super().__init__(config, layout, model, device)
        self.initialise()

    def forward_backward_step(self, batches: Iterator[Tensor]) -> Tensor:
        with self.stopwatch.part("whole step"):  # DeepSpeed's schedule interleaves its parts
            return self.deepspeed.train_batch(data_iter=map(self.split, batches))

    def evaluate(self, batches: Iterator[Tensor], count: int) -> Tensor:
        return self.deepspeed.eval_batch(
            map(self.split, batches), num_micro_batches=count * self.accumulation
        )

    def observe(self, tokens: Tensor, hook: Callable[[str, Tensor], None]) -> None:
        tokens = tokens.to(self.device)
        self.deepspeed.reset_activation_shape()  # else stages exchange what is as long as before
        with self.watching(hook):
            # Its last stage wants labels; any will do.
            self.deepspeed.eval_batch(iter([(tokens, tokens)]), num_micro_batches=1)
        self.deepspeed.reset_activation_shape()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            number, _, rest = name.partition(".")  # DeepSpeed names a layer by its number
            yield self.pieces[int(number)].prefix + rest, parameter


def build(config: Config) -> Engine:
    """The engine of this rank's part of the run."""
    layout = initialise_layout(config.parallel)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    kind = PipelineEngine if layout.pipeline_size > 1 else WholeModelEngine
    return kind(config, layout, device)
