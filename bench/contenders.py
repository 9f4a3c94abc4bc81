"""Training steps to be timed: ours in its variants, and the peers'.

Every step is forward, backward and update of the same Pythia shape on the same tokens, in the
same dtype, with torch's fused AdamW.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.choices import InductorChoices

from l2e import Controller, L2EConfig, attach
from model.block import inhibitor_of
from model.config import ModelConfig
from model.gpt_neox import GPTNeoX
from model.huggingface import hugging_face_config

Step = Callable[[], object]
Model = TypeVar("Model", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Inhibiting from the second step on, so that every timed step does the whole work.
L2E: dict[str, Any] = {"late_start_step": 1}
VARIANTS: dict[str, L2EConfig | None] = {
    "ours": None,
    "ours + l2e mid2": L2EConfig(layers="mid2", **L2E),
    "ours + l2e all": L2EConfig(layers="all", **L2E),
    "ours + MEmeL top-k mid2": L2EConfig(
        layers="mid2", method="deactivate", selection="topk", **L2E
    ),
}
TRITON_VARIANTS: dict[str, L2EConfig | None] = {
    "ours + l2e mid2, Triton": L2EConfig(layers="mid2", kernels="triton", **L2E),
    "ours + l2e all, Triton": L2EConfig(layers="all", kernels="triton", **L2E),
}


@dataclass(frozen=True)
class Workload:
    """What every contender trains on."""

    config: ModelConfig
    batch_size: int
    sequence_length: int
    dtype: str
    device: torch.device

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.sequence_length

    def sample(self) -> tuple[Tensor, Tensor]:
        """Tokens and the labels that follow them, each [batch_size, sequence_length]."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.sequence_length + 1)
        tokens = torch.randint(self.config.vocab_size, shape, generator=generator)
        tokens = tokens.to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def place(self, model: Model) -> Model:
        """The model on the device, in the dtype, ready to train."""
        return model.to(self.device, DTYPES[self.dtype]).train()


class _SumsApart(InductorChoices):
    """Puts no two sums into one of inductor's kernels.

    PyTorch 2.13 writes code for a CPU that is no C++ where a kernel stores one bf16 sum twice, such
    as the gradient of two biases of a parallel block.
    """

    @staticmethod
    def can_fuse_horizontal(scheduler, node1, node2, shared_data_score: int) -> bool:
        if node1.is_reduction() and node2.is_reduction():
            return False
        return InductorChoices.can_fuse_horizontal(scheduler, node1, node2, shared_data_score)

    def uuid(self) -> str:
        return "sums apart"


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, torch.compile works for a CPU in bf16 too; enter before it is first used."""
    choices = None if torch.cuda.is_available() else _SumsApart
    torch.compiler.reset()  # of an earlier workload, which would count as other shapes of the code
    with inductor.patch(inductor_choices_class=choices):
        yield


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """The process group of one rank that tensor-parallel layers ask for."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def our_steps(
    work: Workload, variants: dict[str, L2EConfig | None], *, compiled: bool = False
) -> dict[str, Step]:
    """Our model's step with each kind of inhibition; all share one model's parameters."""
    model = work.place(GPTNeoX(work.config, seed=0))
    blocks = list(model.gpt_neox.layers)
    if compiled:
        for block in blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, labels = work.sample()

    def step_of(l2e: L2EConfig | None) -> Step:
        inhibitors = [inhibitor_of(n, work.config, l2e) for n in range(len(blocks))]
        layers = [layer for layer in inhibitors if layer is not None]
        controller = Controller(layers, l2e) if l2e else None

        def step() -> None:
            for block, inhibitor in zip(blocks, inhibitors, strict=True):
                mlp: Any = block.mlp
                mlp.inhibitor = inhibitor
            model(tokens, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if controller:
                controller.step()

        return step

    return {name: step_of(l2e) for name, l2e in variants.items()}


def transformers_step(
    work: Workload, *, compiled: bool = False, attached: L2EConfig | None = None
) -> Step:
    """GPTNeoXForCausalLM with scaled-dot-product attention, with L2E where it is `attached`."""
    form = transformers.GPTNeoXConfig.from_dict(hugging_face_config(work.config))
    form._attn_implementation = "sdpa"
    model = work.place(transformers.GPTNeoXForCausalLM(form))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    handle = attach(model, "gpt_neox.layers.*.mlp.act", attached) if attached else None
    forward = torch.compile(model) if compiled else model
    tokens, labels = work.sample()

    def step() -> None:
        loss = forward(input_ids=tokens, labels=labels, shift_labels=labels).loss
        (loss + handle.loss() if handle else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle:
            handle.step()

    return step


def megatron_step(work: Workload) -> Step:
    """megatron-core's GPTModel in its local form (no Transformer Engine): CUDA only.

    Its block is sequential, for it has no parallel residual; shapes and FLOPs are Pythia's.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    if work.device.type != "cuda":
        raise RuntimeError("megatron-core's GPTModel needs CUDA (its rotary embedding)")
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=work.config.num_layers,
        hidden_size=work.config.hidden_size,
        ffn_hidden_size=work.config.intermediate_size,
        num_attention_heads=work.config.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=work.dtype == "bf16",
        params_dtype=DTYPES[work.dtype],
        pipeline_dtype=DTYPES[work.dtype],
    )
    model = work.place(
        GPTModel(
            config,
            get_gpt_layer_local_spec(),
            vocab_size=work.config.vocab_size,
            max_sequence_length=work.sequence_length,
            position_embedding_type="rope",
            rotary_percent=work.config.rotary_percent,
            share_embeddings_and_output_weights=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, labels = work.sample()
    length = work.sequence_length
    positions = torch.arange(length, device=work.device).expand(work.batch_size, length)
    future = torch.ones(length, length, device=work.device).triu(1).bool()[None, None]

    def step() -> None:
        model(tokens, positions, future, labels=labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
