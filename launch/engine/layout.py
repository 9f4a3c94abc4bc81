"""The grid of tensor, pipeline and data parallel ranks, on megatron-core's process groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from configs.schema import Parallel


@dataclass(frozen=True)
class Layout:
    """Where this rank stands in the grid of tensor x pipeline x data parallel ranks."""

    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    def __str__(self) -> str:
        return (
            f"{self.tensor_size} tensor x {self.pipeline_size} pipeline x {self.data_size} data "
            f"parallel"
        )


def initialise_layout(parallel: Parallel) -> Layout:
    """Build megatron-core's process groups and read this rank's place off them."""
    from megatron.core import parallel_state as state

    state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        create_gloo_process_groups=False,
    )
    return Layout(
        tensor_rank=state.get_tensor_model_parallel_rank(),
        tensor_size=state.get_tensor_model_parallel_world_size(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        pipeline_size=state.get_pipeline_model_parallel_world_size(),
        data_rank=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        tensor_group=state.get_tensor_model_parallel_group(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        data_group=state.get_data_parallel_group(),
    )


def release_layout() -> None:
    """Forget megatron-core's process groups, so that others can be built."""
    from megatron.core import parallel_state as state

    state.destroy_model_parallel()
