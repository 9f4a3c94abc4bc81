"""Master weights and optimizer moments of a DeepSpeed engine, one whole parameter at a time.

ZeRO cuts them into flat pieces that no rank has whole. This is the one place that knows how each
(ZeRO stage, dtype) keeps them; the checkpoint sees float32 tensors of the parameter's own shape.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from launch.checkpoint.stored import MODEL

# The name under which the master weight itself is asked for, beside the optimizer's own names.
MASTER = MODEL


class OptimizerState:
    """Reads and writes the float32 state of `optimizer`, DeepSpeed's or torch's own.

    All methods are collective over the data-parallel ranks, which must call them for the same
    parameters in the same order. Shapes are those of this tensor-parallel shard.
    """

    def __init__(self, optimizer):
        # Not at the top of this file: the engine must set DS_ACCELERATOR before the first import.
        import deepspeed

        self.deepspeed = deepspeed
        self.optimizer = optimizer
        self.basic = getattr(optimizer, "optimizer", optimizer)
        self._link()

    def _link(self) -> None:
        """Tell ZeRO-1 and 2 which piece of the optimizer's state belongs to which parameter.

        DeepSpeed does so once, after the first step of the first parameter group, when the other
        groups have no state yet; their parameters then cannot be read.
        """
        if self.basic.state and hasattr(self.optimizer, "_hp_optimizer_states_linked"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the per-element state (AdamW: exp_avg, exp_avg_sq); () before the first step."""
        for master, state in self.basic.state.items():
            return tuple(
                sorted(
                    name
                    for name, value in state.items()
                    if torch.is_tensor(value) and value.shape == master.shape and value.dim()
                )
            )
        return ()

    @property
    def steps(self) -> int:
        """Updates the optimizer has made (AdamW's bias correction counts them)."""
        for state in self.basic.state.values():
            if "step" in state:
                return int(state["step"])
        return int(self.basic.param_groups[0].get("step", 0))

    def set_steps(self, steps: int) -> None:
        for state in self.basic.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(steps)
            elif "step" in state:
                state["step"] = steps
        for group in self.basic.param_groups:
            if "step" in group:
                group["step"] = steps

    def create(self) -> None:
        """Let a fresh optimizer allocate its moments, in whatever form it keeps them.

        One step with zero gradients at learning rate zero; what it leaves is overwritten.
        """
        if self.basic.state:
            return
        groups = self.basic.param_groups
        saved = [(group["params"], group["lr"]) for group in groups]
        if hasattr(self.optimizer, "sub_group_to_group_id"):  # ZeRO-3 steps sub-group by sub-group
            pieces = self.optimizer.fp32_partitioned_groups_flat
            for group in groups:
                group["params"] = []
            for sub_group, group in self.optimizer.sub_group_to_group_id.items():
                groups[group]["params"] = [*groups[group]["params"], pieces[sub_group]]
        masters = [master for group in groups for master in group["params"]]
        gradients = [master.grad for master in masters]
        for master in masters:
            master.grad = torch.zeros_like(master)
        for group in groups:
            group["lr"] = 0.0
        self.basic.step()
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        for group, (params, rate) in zip(groups, saved, strict=True):
            group["params"], group["lr"] = params, rate
        self._link()

    @torch.no_grad()
    def read(self, parameter: Parameter, name: str) -> Tensor:
        """The whole master weight or moment `name` of a parameter, float32."""
        if partitioned(parameter) or hasattr(parameter, "_hp_mapping"):
            if name == MASTER:
                return self.deepspeed.utils.safe_get_full_fp32_param(parameter)
            return self.deepspeed.utils.safe_get_full_optimizer_state(parameter, name)
        return self._held(parameter, name)

    @torch.no_grad()
    def write(self, parameter: Parameter, name: str, value: Tensor) -> None:
        """Set the master weight or moment `name`; a master also sets the model's own copy."""
        if partitioned(parameter):
            self._write_piece(parameter, name, value)
        elif hasattr(parameter, "_hp_mapping"):
            if name == MASTER:
                self.deepspeed.utils.safe_set_full_fp32_param(parameter, value)
            else:
                self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, name)
        else:
            self._held(parameter, name).copy_(value)
        if name == MASTER and not partitioned(parameter):
            parameter.copy_(value)

    def _held(self, parameter: Parameter, name: str) -> Tensor:
        """Without ZeRO, which is for fp32 alone, every rank holds all of it."""
        return parameter.detach() if name == MASTER else self.basic.state[parameter][name]

    def _write_piece(self, parameter: Any, name: str, value: Tensor) -> None:
        """ZeRO-3: this rank's piece. The last rank's is padded, which DeepSpeed's own
        whole-tensor setter does not allow for."""
        size = self.deepspeed.utils.safe_get_local_fp32_param(parameter).numel()
        start = size * dist.get_rank(parameter.ds_process_group)
        piece = value.new_zeros(size)
        own = value.flatten()[start : start + size]
        piece[: own.numel()] = own
        if name != MASTER:
            self.deepspeed.utils.safe_set_local_optimizer_state(parameter, piece, name)
            return
        self.deepspeed.utils.safe_set_local_fp32_param(parameter, piece)
        # The modifier is a rank of the data-parallel group; all of them have the same value.
        with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)


def partitioned(parameter: Parameter) -> bool:
    """Whether ZeRO-3 has cut this parameter itself into pieces."""
    return hasattr(parameter, "ds_id")


def local_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of this tensor-parallel shard, also while ZeRO-3 holds it in pieces."""
    return tuple(parameter.ds_shape if partitioned(parameter) else parameter.shape)
