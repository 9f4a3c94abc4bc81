"""The parts of `bench/gpu.py`: each measures one thing and saves what it has as it goes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import contenders
from bench.contenders import Step, Workload, megatron_step, one_process, our_steps
from bench.machine import default_device, describe_machine
from bench.random_tokens import write_random_tokens
from bench.timing import added, estimate, interleave
from l2e import Controller, L2EConfig, L2ELayer, kernels
from l2e.kernels import KernelArguments
from launch.planning.cost import flops_per_token
from model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
CPU_CURVE = ROOT / "bench" / "results" / "gpu" / "cpu_curve_70m.json"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else default_device()  # as tensors name theirs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Pythia's shapes in training: micro-batch, and so tokens and neurons of a layer.
SHAPES = {"70m": (32, 2048), "410m": (16, 2048), "2.8b": (4, 2048)}
TINY = ModelConfig.model_validate(
    {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
)

# Largest relative error against float64 (2-norm). The interpreter truncates to bf16.
LAYER_LIMITS = {"fp32": 1e-5, "bf16": 1e-2 if CUDA else 3e-2, "fp16": 2e-3}
# Largest differences of the training loss from the CPU's fp32 run, in nats: docs/gpu.md.
TRAINING_LIMITS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}


class Part:
    """What one part found, saved with every addition; `end` is when the bench has to stop."""

    def __init__(self, path: Path, smoke: bool, end: float) -> None:
        self.path, self.smoke, self.end = path, smoke, end
        self.begin = time.monotonic()
        self.left_over = torch.cuda.memory_allocated() if CUDA else 0  # bytes, by earlier parts
        self.found: dict[str, Any] = {"failed": []}

    @property
    def left(self) -> float:
        """Seconds until the bench has to stop."""
        return self.end - time.monotonic()

    @property
    def peak_gigabytes(self) -> float:
        """Of this part's own memory on the GPU, since its peak was last reset."""
        return (torch.cuda.max_memory_allocated() - self.left_over) / 1e9

    def save(self, **more: Any) -> None:
        """Keep `more` and print it."""
        self.found |= more | {"seconds": round(time.monotonic() - self.begin, 1)}
        self.path.write_text(json.dumps(self.found, default=str) + "\n")
        for name, value in more.items():
            print(f"[{self.path.stem} {self.found['seconds']:5.1f}] {name}: {value}", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A failure ends this attempt alone, and its memory is freed."""
        try:
            yield
        except Exception as error:
            self.fail(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            traceback.print_exc()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()

    def fail(self, why: str) -> None:
        """Remember what went wrong or is out of its tolerance."""
        self.save(failed=[*self.found["failed"], why])


def run(name: str, path: Path, smoke: bool, end: float) -> None:
    """Run one part."""
    part = Part(path, smoke, end)
    subject, _, preset = name.partition("_")
    with part.attempt(name):
        PARTS[subject](part, *([preset] if preset else []))
    part.save()


def drain() -> None:
    """Wait for the GPU."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(part: Part, call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call, by the device's own events."""
    taken = []
    for turn in range(1 if part.smoke else rounds + 3):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        if part.smoke or turn >= 3:
            taken.append(1e3 * seconds)
    return sorted(taken)[len(taken) // 2]


def relative(found: Tensor, wanted: Tensor) -> float:
    """The 2-norm of the error over that of what was wanted."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


# --- the machine ------------------------------------------------------------------------------


def machine(part: Part) -> None:
    """Versions, and the speed of a copy and of a matrix product: the roofs of what follows."""
    part.save(machine=describe_machine(DEVICE))
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        part.save(memory_bytes=properties.total_memory, sms=properties.multi_processor_count)
    part.save(copy_bytes_per_second=copy_speed(part))
    size = 64 if part.smoke else 8192
    x, y = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    part.save(bf16_flops=2 * size**3 / milliseconds(part, lambda: x @ y) * 1e3)


def copy_speed(part: Part) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.zeros(2**14 if part.smoke else 2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * len(source) / milliseconds(part, lambda: target.copy_(source), 5) * 1e3


# --- the layer's kernels ------------------------------------------------------------------------

LAYER_CASES = [
    ("gelu", "regularize", False),
    ("gelu", "deactivate", False),
    ("gelu", "none", False),
    ("gelu_tanh", "regularize", True),
    (None, "regularize", False),
]


def layer(part: Part) -> None:
    """Both kinds of kernels against float64; their time against the memory's."""
    from l2e import triton_kernels

    shapes = [(300, 70)] if part.smoke else [(4133, 2048), (4096, 2048), (1000, 10240), (777, 333)]
    cases = LAYER_CASES[:2] if part.smoke else LAYER_CASES
    worst: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        for case in cases:
            for shape in shapes if case == cases[0] else shapes[:2]:
                for kind, made_by in (("plain", kernels), ("triton", triton_kernels)):
                    with part.attempt(f"{kind} {name} {case} {shape}"):
                        errors = layer_errors(made_by, shape, dtype, *case)
                        for what, error in errors.items():
                            key = f"{kind} {name} {what}"
                            worst[key] = max(worst.get(key, 0.0), error)
                            if not error <= LAYER_LIMITS[name]:
                                part.fail(f"{kind} {name} {case} {shape}: {what} {error:.1e}")
        part.save(worst_relative_errors={k: float(f"{v:.2e}") for k, v in worst.items()})
    copy = copy_speed(part)
    for preset, (batch, length) in SHAPES.items():
        tokens, neurons = (
            batch * length,
            ModelConfig.model_validate({"preset": preset}).intermediate_size,
        )
        if part.smoke:
            tokens, neurons = 64, 64
        with part.attempt(f"time {preset}"):
            part.save(**{f"time_{preset}": layer_times(part, tokens, neurons, copy)})


def layer_errors(
    made_by: Any,
    shape: tuple[int, int],
    dtype: torch.dtype,
    activation: str | None,
    method: str,
    balanced: bool,
) -> dict[str, float]:
    """Relative errors of all that a pass gives, against float64 that rounds where storage does."""
    neurons = shape[1]
    generator = torch.Generator(device=DEVICE).manual_seed(neurons)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    pre, grad, bias = (
        (1.5 * draw(*shape)).to(dtype),
        draw(*shape).to(dtype),
        draw(neurons).to(dtype),
    )
    mean, threshold = 0.3 * draw(neurons), draw(neurons).abs() + 0.5
    balance = threshold / 100 if balanced else None
    arguments = KernelArguments(
        activation, method, 1.5, mean, threshold, balance=balance, bias=bias
    )
    sums = torch.zeros(3 * neurons + 1, device=DEVICE)
    out = made_by.forward(pre, arguments, sums)
    to_pre, to_bias = made_by.backward(grad, pre, arguments, 0.3)

    x = (pre.float() + bias.float()).to(dtype).double().requires_grad_()
    z = x if activation is None else F.gelu(x, approximate=kernels.APPROXIMATE[activation])
    stored = z.detach().to(dtype)
    d = stored.double() - mean.double()
    selected = (stored.float() - mean).square() >= threshold
    wanted, g = z.detach(), grad.double()
    if method == "deactivate":
        wanted = torch.where(selected, mean.to(dtype).double(), wanted)
        g = torch.where(selected, -1.5 * g, g)
    elif method == "regularize":
        direction = torch.where(selected, 1 / torch.where(selected, d, 1), 0)
        g = g + 0.6 * (direction if balance is None else direction - d * balance.double())
    (gradient,) = torch.autograd.grad(z, x, g)
    # Either choice is right for what rounding can move over the threshold.
    near = (d.square() - threshold).abs() < 0.02 * threshold
    errors = {
        "output": relative(torch.where(near, wanted, out.double()), wanted),
        "gradient": relative(torch.where(near, gradient, to_pre.double()), gradient),
        "deviations": relative(sums[:neurons], d.sum(0)),
        "squares": relative(sums[neurons : 2 * neurons], d.square().sum(0)),
        "selected": relative(sums[2 * neurons : -1].sum(), selected.sum()),
        "bias gradient": relative(to_bias, to_pre.double().sum(0)),
        "not repeated": float((made_by.forward(pre, arguments, sums) != out).sum()),
    }
    if method == "regularize":
        logs = torch.where(selected, d.square(), 1).log().sum()
        errors["logs"] = relative(sums[-1] / 2, logs)  # the repetition added them again
    return errors


def layer_times(part: Part, tokens: int, neurons: int, copy: float) -> dict[str, Any]:
    """Milliseconds and the share of the memory's speed; other numbers of programs beside ours."""
    from l2e import triton_kernels

    # Several inputs in turn, so that none comes from a cache.
    inputs = [(1.5 * torch.randn(tokens, neurons, device=DEVICE)).bfloat16() for _ in range(3)]
    grad = torch.randn(tokens, neurons, device=DEVICE).bfloat16()
    mean, threshold = (
        torch.zeros(neurons, device=DEVICE),
        torch.full((neurons,), 4.0, device=DEVICE),
    )
    bias, sums = mean.bfloat16(), torch.zeros(3 * neurons + 1, device=DEVICE)
    arguments = KernelArguments("gelu", "regularize", 1.0, mean, threshold, bias=bias)
    turn = [0]

    def pre() -> Tensor:
        turn[0] = (turn[0] + 1) % len(inputs)
        return inputs[turn[0]]

    def both(made_by: Any, rounds: int) -> tuple[float, float]:
        return (
            milliseconds(part, lambda: made_by.forward(pre(), arguments, sums), rounds),
            milliseconds(part, lambda: made_by.backward(grad, pre(), arguments, 0.3), rounds),
        )

    gelu = (
        milliseconds(part, lambda: F.gelu(pre())),
        milliseconds(part, lambda: torch.ops.aten.gelu_backward(grad, pre())),
    )
    times = {"gelu": gelu, "triton": both(triton_kernels, 20), "plain": both(kernels, 3)}
    least = [1e3 * tokens * neurons * moved / copy for moved in (4, 6)]
    found: dict[str, Any] = {
        name: {
            f"{way}_{what}": round(value, 4)
            for way, ms, floor in zip(("forward", "backward"), pair, least, strict=True)
            for what, value in (("ms", ms), ("of_memory_speed", floor / ms))
        }
        for name, pair in times.items()
    }
    if CUDA:
        ours = triton_kernels.PROGRAMS_PER_PROCESSOR, triton_kernels.WARPS
        for programs, warps in ((6, 4), (7, 4), (8, 2), (10, 2), (14, 2), (16, 2), (24, 1)):
            triton_kernels.PROGRAMS_PER_PROCESSOR, triton_kernels.WARPS = programs, warps
            triton_kernels.programs_at_once.cache_clear()
            found[f"programs {programs}, warps {warps}"] = both(triton_kernels, 10)
        triton_kernels.PROGRAMS_PER_PROCESSOR, triton_kernels.WARPS = ours
        triton_kernels.programs_at_once.cache_clear()
    return found


# --- the loss ---------------------------------------------------------------------------------


def loss(part: Part) -> None:
    """The cross-entropy against float64, and its time beside its matrix products'."""
    from megatron.core import parallel_state

    from model.loss import cross_entropy, fused_softmax

    with one_process(DEVICE):
        group = parallel_state.get_tensor_model_parallel_group()
        for name, dtype in DTYPES.items():
            with part.attempt(name):
                fused = fused_softmax(DEVICE, dtype, group) is not None
                errors = loss_errors(part, dtype, group)
                part.save(**{f"loss_{name}": {"triton": fused} | errors})
                if not max(errors.values()) <= {"fp32": 1e-5}.get(name, 1e-2):
                    part.fail(f"{name}: {errors}")
        for preset, (batch, length) in SHAPES.items():
            config = TINY if part.smoke else ModelConfig.model_validate({"preset": preset})
            tokens = 64 if part.smoke else batch * length
            h, w, y = loss_inputs(tokens, config.hidden_size, config.vocab_size, torch.bfloat16)

            def ours(h=h, w=w, y=y, config=config) -> None:
                cross_entropy(h, w, y, config.vocab_size, group).backward()

            def products(h=h, w=w) -> None:
                for part_of_h in h.detach().split(8192):
                    logits = part_of_h @ w.detach().t()
                    logits @ w.detach()
                    logits.t() @ part_of_h

            with part.attempt(preset):
                times = {"ours_ms": milliseconds(part, ours, 5)}
                times["products_ms"] = milliseconds(part, products, 5)
                beyond = (times["ours_ms"] - times["products_ms"]) / 1e3
                times["nanoseconds_a_logit_beyond"] = 1e9 * beyond / tokens / config.vocab_size
                part.save(**{f"time_{preset}": times})


def loss_inputs(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output embedding and labels."""
    h = torch.randn(tokens, hidden, device=DEVICE).to(dtype).requires_grad_()
    w = (0.05 * torch.randn(vocabulary, hidden, device=DEVICE)).to(dtype).requires_grad_()
    return h, w, torch.randint(vocabulary, (tokens,), device=DEVICE)


def loss_errors(part: Part, dtype: torch.dtype, group: Any) -> dict[str, float]:
    """Relative errors of the loss and its gradients, with rows that take no part."""
    from model.loss import cross_entropy

    tokens, hidden, rows = (70, 64, 1024) if part.smoke else (3000, 512, 50304)
    vocabulary = rows - 50
    h, w, y = loss_inputs(tokens, hidden, rows, dtype)
    y = y.clamp(max=vocabulary - 1)
    value = cross_entropy(h, w, y, vocabulary, group)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    (value * scale).backward()
    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (h, w))
    exact = F.cross_entropy((exact_h @ exact_w.t())[:, :vocabulary], y)
    exact.backward()
    assert h.grad is not None
    assert w.grad is not None
    assert exact_h.grad is not None
    assert exact_w.grad is not None
    return {
        "loss": abs(value.item() / exact.item() - 1),
        "to_hidden": relative(h.grad / scale, exact_h.grad),
        "to_weight": relative(w.grad / scale, exact_w.grad),
    }


# --- a training step through DeepSpeed ----------------------------------------------------------


def write_config(folder: Path, smoke: bool, **changes: Any) -> Path:
    """A configuration of 70M (or a tiny model) on few different tokens, which are soon learnt."""
    if not (folder / "tokens.bin").exists():
        write_random_tokens(folder / "tokens", 2**16 if smoke else 2**25, vocab_size=500)
    tiny = TINY.model_dump(include={"num_layers", "hidden_size", "num_attention_heads"})
    config: dict[str, dict[str, Any]] = {
        "model": tiny | {"vocab_size": 512} if smoke else {"preset": "70m"},
        "l2e": {"late_start_step": 3, "layers": "mid2"},
        "data": {"path": str(folder / "tokens"), "sequence_length": 64 if smoke else 256},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"type": "constant", "warmup_steps": 5},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 4, "dtype": "fp32"},
        "checkpoint": {"interval": 0},
        "evaluate": {"interval": 0, "batches": 1},
        "logging": {"interval": 1, "tensorboard": False},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    path = folder / f"config_{len(list(folder.glob('config_*')))}.json"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def engine_for(config: Any) -> Iterator[Any]:
    """The engine that training builds, in a process group of its own."""
    from launch.engine.engine import build
    from launch.engine.groups import process_group
    from launch.engine.layout import release_layout
    from launch.engine.processes import find

    with process_group(find()):
        try:
            yield build(config)
        finally:
            release_layout()


def step(part: Part) -> None:
    """One optimizer step as training takes it, with and without measuring, and where it waits."""
    import configs

    batch, length = (2, 64) if part.smoke else SHAPES["70m"]
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(
            Path(folder),
            part.smoke,
            train__dtype="bf16" if CUDA else "fp32",
            train__micro_batch_size=batch,
            train__global_batch_size=2 * batch,
            train__compile=CUDA,
            data__sequence_length=length,
        )
        config = configs.load(str(path))
        with engine_for(config) as engine:
            part.save(blocks=engine.compiled)
            drawn = torch.randint(500, (2 * batch, length + 1))
            drawn = drawn.pin_memory() if CUDA else drawn

            def one(measured: bool = False) -> None:
                engine.measure(measured)
                engine.train_step(iter(drawn.split(batch)), 1e-4)

            begin = time.monotonic()
            for _ in range(5):
                one()
            one(True)
            drain()
            part.save(first_six_steps_seconds=time.monotonic() - begin)
            step_times(part, one, flops_per_token(config.model, length), 2 * batch * length)
            if CUDA:
                with part.attempt("waits"):
                    part.save(
                        host_waits={"plain": waits(one), "measured": waits(lambda: one(True))}
                    )
                with part.attempt("profile"):
                    part.save(
                        profile=kernel_times(one), profile_measured=kernel_times(lambda: one(True))
                    )


def step_times(part: Part, one: Callable[..., None], flops: float, tokens: int) -> None:
    """Seconds of plain and measured steps in turn, and their peak memory."""

    def timed(measured: bool, count: int) -> float:
        drain()
        begin = time.perf_counter()
        for _ in range(count):
            one(measured)
        drain()
        return (time.perf_counter() - begin) / count

    turns = [(timed(False, 5), timed(True, 2)) for _ in range(1 if part.smoke else 5)]
    plain, measured = (sorted(times)[len(turns) // 2] for times in zip(*turns, strict=True))
    part.save(
        plain_seconds=plain,
        measured_seconds=measured,
        measured_adds_percent=100 * (measured / plain - 1),
        tokens_per_second=tokens / plain,
        achieved_tflops=flops * tokens / plain / 1e12,
    )
    if CUDA:
        peaks = []
        for kind in (False, True):
            torch.cuda.reset_peak_memory_stats()
            one(kind)
            drain()
            peaks.append(part.peak_gigabytes)
        part.save(peak_memory_GB={"plain": peaks[0], "measured": peaks[1]})


def waits(call: Callable[[], object]) -> dict[str, int]:
    """Where the host waits for the GPU within a call, and how often."""
    places: Counter[str] = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchroniz" in str(message):
            stack = [f for f in traceback.extract_stack() if "/torch/" not in f.filename][:-1]
            names = [f"{Path(f.filename).name}:{f.lineno}" for f in reversed(stack[-4:])]
            places[" <- ".join(names)] += 1

    shown = warnings.showwarning
    drain()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode(1)
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(0)
            warnings.showwarning = shown
    return dict(places)


def kernel_times(call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, launches, milliseconds) of a call, longest first, all of them summed first."""
    from torch.profiler import DeviceType, profile

    with profile() as recorded:
        call()
        drain()
    rows = [
        (event.key[:90], event.count, round(event.self_device_time_total / 1e3, 3))
        for event in recorded.key_averages()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    rows.sort(key=lambda row: -row[2])
    total = ("all kernels", sum(row[1] for row in rows), round(sum(row[2] for row in rows), 3))
    return [total, *rows[:28]]


# --- training, end to end -----------------------------------------------------------------------


def training(part: Part) -> None:
    """70M for twenty steps in several ways beside the loss curve of an fp32 run on a CPU."""
    import configs

    ways: dict[str, dict[str, Any]] = {
        "fp32, plain": {"train__dtype": "fp32", "l2e__kernels": "plain"},
        "fp32": {"train__dtype": "fp32"},
        "bf16": {"train__dtype": "bf16"},
        "bf16, again": {"train__dtype": "bf16"},
        "fp16": {"train__dtype": "fp16"},
        "bf16, compiled": {"train__dtype": "bf16", "train__compile": True},
        "bf16, no L2E": {"train__dtype": "bf16", "l2e__method": "none"},
    }
    if not CUDA:
        ways = {name: ways[name] for name in ("fp32, plain", "bf16")}
    reference = None if part.smoke else json.loads(CPU_CURVE.read_text())["lm_loss"]
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in ways.items():
            with part.attempt(name):
                path = write_config(Path(folder), part.smoke, **changes)
                curves[name] = train(configs.load(str(path)), Path(folder))
                reference = reference or curves[name]  # tiny shapes' is their own fp32 run
                apart = largest_difference(curves[name], reference)
                part.save(**{name: {"lm_loss": curves[name], "apart_from_cpu": apart}})
                limit = TRAINING_LIMITS[name[:4]]
                if not apart <= limit:
                    part.fail(f"{name}: {apart:.1e} from the CPU's fp32 loss; at most {limit}")
    if "bf16, again" in curves:
        part.save(two_bf16_runs_apart=largest_difference(curves["bf16"], curves["bf16, again"]))


def train(config: Any, folder: Path) -> list[float]:
    """The loss of each step."""
    from launch.training import data
    from launch.training.position import Position
    from launch.training.schedule import learning_rate

    start = Position()
    corpus = data.open_corpus(config, folder, data.fetch(config, folder), start)
    losses = []
    with engine_for(config) as engine:
        batches = corpus.training_batches(start, engine.layout)
        for number in range(config.train.steps):
            losses.append(engine.train_step(batches, learning_rate(config, number)))
    return [float(value) for value in losses]


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of two curves, in nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def resume(part: Part) -> None:
    """The command itself: twenty steps at once, and ten and ten; the same losses?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_config(folder, part.smoke, train__dtype="bf16" if CUDA else "fp32")

        def pretrain(run_dir: str, *extra: str) -> list[float]:
            command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(path)]
            command += ["--run-dir", str(folder / run_dir), *extra]
            subprocess.run(command, check=True, timeout=max(10, part.left), cwd=ROOT)
            lines = (folder / run_dir / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line)["lm_loss"] for line in lines]

        whole = pretrain("whole")
        halves = ["--set", "train.stop_after=10", "--set", "checkpoint.interval=10"]
        pretrain("parts", *halves)
        resumed = pretrain("parts", "--resume", "auto")
        part.save(steps=len(resumed), largest_difference=largest_difference(resumed, whole))


# --- measured steps, layer alone ------------------------------------------------------------------


def measuring(part: Part) -> None:
    """What measuring costs one layer: time and memory; and how long the controller's step takes."""
    for preset in ("70m", "2.8b"):
        batch, length = SHAPES[preset]
        tokens, neurons = (
            batch * length,
            ModelConfig.model_validate({"preset": preset}).intermediate_size,
        )
        if part.smoke:
            tokens, neurons = 64, 64
        with part.attempt(preset):
            config = L2EConfig(late_start_step=1)
            inhibitors = [
                L2ELayer(neurons, config, name=str(n), inhibited_layers=2).train().to(DEVICE)
                for n in range(2)
            ]
            controller = Controller(inhibitors, config)
            pre = torch.randn(tokens, neurons, device=DEVICE).bfloat16().requires_grad_()
            grad = torch.randn_like(pre)

            def call(pre=pre, grad=grad, inhibitors=inhibitors) -> None:
                for inhibitor in inhibitors:
                    torch.autograd.grad(inhibitor(pre), pre, grad)

            found: dict[str, Any] = {}
            for _ in range(3):
                call()
                controller.step()
            for measured in (False, True):
                controller.measure = measured
                kind = "measured" if measured else "plain"
                if CUDA:
                    torch.cuda.reset_peak_memory_stats()
                found[f"{kind}_ms"] = milliseconds(part, call, 5)
                if CUDA:
                    found[f"{kind}_peak_GB"] = part.peak_gigabytes
            call()
            found["controller_step_ms"] = milliseconds(part, controller.step, 10)
            if CUDA:
                found["controller_launches"] = kernel_times(controller.step)[0][1]
            part.save(**{preset: found})


# --- whole steps: ours and others' ---------------------------------------------------------------


def workload(part: Part, preset: str) -> Workload:
    """One micro-batch of a Pythia shape; weights are drawn where they will be."""
    if part.smoke:
        return Workload(TINY, 2, 64, "fp32", DEVICE)
    batch, length = SHAPES[preset]
    return Workload(ModelConfig.model_validate({"preset": preset}), batch, length, "bf16", DEVICE)


def speed(part: Part, preset: str) -> None:
    """L2E off, on two layers, on all, and MEmeL's top k, compiled, taking turns."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # the variants share a block's code
    off = "ours"
    variants = {
        off: None,
        "l2e mid2": L2EConfig(layers="mid2", late_start_step=1),
        "l2e all": L2EConfig(layers="all", late_start_step=1),
        "MEmeL top-k mid2": contenders.VARIANTS["ours + MEmeL top-k mid2"],
        "l2e mid2, plain kernels": L2EConfig(layers="mid2", late_start_step=1, kernels="plain"),
    }
    if preset == "2.8b":  # a state for each of 32 layers
        variants.pop("l2e all")
    with one_process(DEVICE), fast_weights():
        work = workload(part, preset)
        begin = time.monotonic()
        steps = our_steps(work, variants, compiled=CUDA)
        timed(part, work, steps, off, begin)


def peers(part: Part, preset: str) -> None:
    """transformers, compiled, and megatron-core: one at a time, so that a failure is its own."""
    with one_process(DEVICE), fast_weights():
        work = workload(part, preset)

        def transformers() -> Step:
            return contenders.transformers_step(work, compiled=CUDA)

        for name, build in (
            ("ours", lambda: our_steps(work, {"ours": None}, compiled=CUDA)["ours"]),
            ("transformers, compiled", transformers),
            ("megatron-core", lambda: megatron_step(work)),
        ):
            with part.attempt(name):
                begin = time.monotonic()
                timed(part, work, {name: build()}, name, begin)


def timed(part: Part, work: Workload, steps: dict[str, Step], off: str, begin: float) -> None:
    """Interleaved seconds of the steps, with 95 % intervals."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for call in steps.values():
        call()
        call()
    drain()
    ready = time.monotonic() - begin
    taken = interleave(steps, 2 if part.smoke else 15, warmup=1)
    flops = flops_per_token(work.config, work.sequence_length) * work.tokens
    for name, seconds in taken.items():
        median = estimate(seconds)
        row: dict[str, Any] = {
            "seconds": median.as_dict(),
            "tokens_per_second": work.tokens / median.median,
            "tflops": flops / median.median / 1e12,
        }
        if name != off:
            row["added_percent"] = added(taken, name, off).as_dict()
        part.save(**{name: row})
    peak = part.peak_gigabytes if CUDA else None
    part.save(**{f"{off}: build, compile, two steps": round(ready, 1), f"{off}: peak GB": peak})


@contextmanager
def fast_weights() -> Iterator[None]:
    """Models are built with weights drawn on the device: drawing 2.8B on the host takes minutes."""
    import model.attention
    import model.embedding
    import model.mlp

    modules = (model.attention, model.embedding, model.mlp)
    placed = Workload.place

    def place(self: Workload, built: torch.nn.Module) -> torch.nn.Module:
        built = placed(self, built)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
        return built

    with ExitStack() as replaced:
        for module in modules:
            replaced.enter_context(patch.object(module, "initializer", lambda *_, **__: _as_it_is))
        replaced.enter_context(patch.object(Workload, "place", place))
        yield


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


# --- attention -----------------------------------------------------------------------------------


def attention(part: Part) -> None:
    """Which kernels torch chose for attention, and their time."""
    from model.attention import Attention

    with one_process(DEVICE):
        for preset in ("70m", "2.8b"):
            with part.attempt(preset):
                batch, length = (1, 64) if part.smoke else SHAPES[preset]
                config = TINY if part.smoke else ModelConfig.model_validate({"preset": preset})
                module = Attention("attention", config, seed=0, sequence_parallel=False)
                module = module.to(DEVICE, torch.bfloat16)
                shape = (length, batch, config.hidden_size)
                x = torch.randn(shape, device=DEVICE).bfloat16().requires_grad_()

                def call(module=module, x=x) -> None:
                    module(x).sum().backward()

                found = {"head_dim": config.head_dim, "ms": milliseconds(part, call, 5)}
                part.save(**{preset: found | ({"kernels": kernel_times(call)[:8]} if CUDA else {})})


PARTS: dict[str, Callable[..., None]] = {
    "machine": machine,
    "layer": layer,
    "loss": loss,
    "step": step,
    "training": training,
    "measuring": measuring,
    "speed": speed,
    "peers": peers,
    "resume": resume,
    "attention": attention,
}
