#!/usr/bin/env bash
# Gathers the wheels that a machine with a GPU, Python 3.12 and its own PyTorch and transformers lacks
# for this project (9 wheels, 13 MB), where there is a network: bash bench/gather_wheels.sh FOLDER
# Then, on that machine: python bench/gpu.py --wheels FOLDER
set -euo pipefail
folder=${1:?the folder to put the wheels in}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
platforms=(--python-version 3.12 --implementation cp --platform manylinux2014_x86_64)
for glibc in 17 24 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
# What `import deepspeed`, `megatron.core`, `configs` and launch/pretrain.py need, as tested.
pinned() { grep -iE "^$1==" constraints.txt; }
"$python" -m pip download -q --no-deps --only-binary=:all: "${platforms[@]}" -d "$folder" \
    "$(pinned megatron-core)" "$(pinned pydantic)" "$(pinned pydantic_core)" \
    "$(pinned annotated-types)" "$(pinned typing-inspection)" "$(pinned typing_extensions)" \
    "$(pinned zstandard)"
# Sources only: pure Python wheels, no CUDA operator compiled.
export DS_BUILD_OPS=0 DS_ACCELERATOR=cpu
"$python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder" \
    "$(pinned hjson)" "$(pinned deepspeed)"
for wheel in "$folder"/deepspeed-*-cp3*.whl; do # nothing in it is compiled: its name should say so
    [ -e "$wheel" ] || continue
    mv "$wheel" "$(sed -E 's/-cp3[0-9]+-cp3[0-9]+-linux_x86_64/-py3-none-any/' <<<"$wheel")"
done
ls -l "$folder"
