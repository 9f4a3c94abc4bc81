"""One view of the MLP neurons of GPT-NeoX, GPT-2 and Llama models in Hugging Face form."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from l2e.hub import parse, refuse_stray_links
from l2e.memory import LARGER_MACHINE, refuse_larger
from l2e.problems import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Where each family keeps its blocks, and its MLP's non-linearity, the projection into it, the
# projection out of it, (gated MLPs) the projection that multiplies the activation; and the norm
# after the last block.
FAMILIES = {
    "gpt_neox": ("layers", "act", "dense_h_to_4h", "dense_4h_to_h", None, "final_layer_norm"),
    "gpt2": ("h", "act", "c_fc", "c_proj", None, "ln_f"),
    "llama": ("layers", "act_fn", "gate_proj", "down_proj", "up_proj", "norm"),
}


@dataclass(frozen=True)
class Layer:
    """One block and the modules around its hidden units.

    activation: the non-linearity; its input is the pre-activation, its output the activation z
    [batch, positions, neurons].
    """

    block: nn.Module
    activation: nn.Module
    inward: nn.Module
    outward: nn.Module
    gate: nn.Module | None

    def input_weight(self) -> torch.Tensor:
        """The weights into each neuron, float32 [neurons, hidden]."""
        return _rows(self.inward).float()

    def input_bias(self) -> torch.Tensor | None:
        """The neurons' biases, float32 [neurons]; None where the MLP has none (Llama)."""
        bias = getattr(self.inward, "bias", None)
        return None if bias is None else bias.detach().float()

    def output_weight(self) -> torch.Tensor:
        """What each neuron adds to the residual stream, [neurons, hidden]."""
        return _rows(self.outward).T


def _rows(linear: nn.Module) -> torch.Tensor:
    """The weight as [outputs, inputs]; GPT-2's Conv1D keeps it the other way round."""
    weight = linear.get_parameter("weight").detach()
    return weight if isinstance(linear, nn.Linear) else weight.T


class Network:
    """A causal language model in Hugging Face form, its tokenizer and its neurons.

    Raises ValueError for a family whose MLPs are not known here.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str):
        family = model.config.model_type
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"{name}: model type {family!r} is not known; known are {known}")
        path, activation, inward, outward, gate, norm = FAMILIES[family]
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.family = family
        self.layers = [
            Layer(
                block,
                getattr(block.mlp, activation),
                getattr(block.mlp, inward),
                getattr(block.mlp, outward),
                getattr(block.mlp, gate) if gate else None,
            )
            for block in getattr(model.base_model, path)
        ]
        self.unembed: nn.Module = model.get_output_embeddings()
        self.final_norm: nn.Module = getattr(model.base_model, norm)
        self.neurons = self.layers[0].input_weight().shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The final hidden states [batch, positions, hidden] of tokens, where `mask` is true."""
        return self.model.base_model(
            input_ids=ids, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def max_positions(self) -> int:
        return self.model.config.max_position_embeddings


def open_network(source: str, *, device: str = "cpu", dtype: str = "float32") -> Network:
    """Load a folder or a Hugging Face id, `owner/name@revision` for one of its revisions.

    Raises ValueError if there is no such model, tokenizer or device, or its family is not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path, revision = parse(source)
    try:
        refuse_stray_links(source)
        config = AutoConfig.from_pretrained(path, revision=revision)
        with torch.device("meta"):  # shapes alone
            shapes = AutoModelForCausalLM.from_config(config)
        needed = torch.empty((), dtype=getattr(torch, dtype)).itemsize * shapes.num_parameters()
        refuse_larger(f"{source} in {dtype}", needed, LARGER_MACHINE)
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=getattr(torch, dtype)
        )
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model with tokenizer could be loaded from {source!r}: {first_line(error)}. Give a "
            "folder in Hugging Face form (config.json, model.safetensors, tokenizer.json) or a "
            "model id"
        ) from error
    try:
        torch.nn.Module.to(model, device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that isn't there
        raise ValueError(f"device {device!r} can't be used: {first_line(error)}") from error
    return Network(model, tokenizer, source)
