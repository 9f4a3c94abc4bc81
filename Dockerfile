# The GPU image: PyTorch's own, with CUDA and NCCL, and the versions of constraints.txt.
#
#   docker build -t l2e:0.1.0 .
#   docker run --gpus all --shm-size 16g -v $PWD/runs:/workspace/runs l2e:0.1.0 \
#       deepspeed launch/pretrain.py --config configs/410m.json
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

WORKDIR /workspace
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# First what seldom changes. The base already holds torch; the constraint keeps pip from moving it.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY l2e ./l2e
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && pip install --constraint /tmp/constraints.txt '.[train]'

COPY configs ./configs
COPY data ./data
COPY model ./model
COPY launch ./launch

CMD ["deepspeed", "launch/pretrain.py", "--config", "configs/410m.json"]
