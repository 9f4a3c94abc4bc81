"""Everything worth asking a GPU, most important first, from one command on one machine.

Each part's numbers are written as soon as it ends; a part that fails, crashes or takes too long
leaves the others'. docs/gpu.md says what every number means.

    python bench/gpu.py
    python bench/gpu.py --only layer,step --seconds 120
    python bench/gpu.py --smoke                            # tiny shapes, on a CPU too
    bash bench/gather_wheels.sh whl                        # for a machine without this project's
    python bench/gpu.py --wheels whl                       # packages: gather, carry over, run
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

# The most seconds of each part on a GPU, in order of importance.
PARTS = {
    "machine": 60,
    "layer": 90,
    "loss": 60,
    "step": 120,
    "training": 150,
    "measuring": 40,
    "speed_70m": 120,
    "peers_70m": 90,
    "attached": 90,
    "speed_2.8b": 120,
    "speed_410m": 120,
    "resume": 120,
    "attention": 40,
    "peers_410m": 90,
}
SMOKE_PARTS = ["machine", "layer", "loss", "step", "training", "measuring", "speed_70m", "attached"]
LEAST_SECONDS = 10  # a part is not begun with less than this left


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        work(arguments)
        return
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if arguments.smoke else {})
    if arguments.wheels:
        environment["PYTHONPATH"] = install(Path(arguments.wheels))
    begin = time.monotonic()
    parts, done = chosen_parts(arguments), []
    with tempfile.TemporaryDirectory() as folder:
        while parts and arguments.seconds - (time.monotonic() - begin) > LEAST_SECONDS:
            left = arguments.seconds - (time.monotonic() - begin)
            parts = supervise(parts, arguments, Path(folder), environment, left)
            done = collect(Path(folder), output)
    missing = [name for name in chosen_parts(arguments) if name not in done]
    print(f"{output} written after {time.monotonic() - begin:.0f} s; no time for: {missing or '-'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=530, help="for everything (default: 530)")
    parser.add_argument("--only", help=f"parts, separated by commas, of: {', '.join(PARTS)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try the bench itself")
    parser.add_argument(
        "--output",
        default=str(ROOT / "bench" / "results" / "gpu" / f"{date.today()}.json"),
        help="JSON file, rewritten after each part (default: bench/results/gpu/DATE.json)",
    )
    parser.add_argument("--wheels", help="folder of wheels to install beside the machine's own")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the folder of a part's results
    return parser.parse_args()


def chosen_parts(arguments: argparse.Namespace) -> list[str]:
    """What will run, in order."""
    if not arguments.only:
        return SMOKE_PARTS if arguments.smoke else list(PARTS)
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        sys.exit(f"--only: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return names


def install(wheels: Path) -> str:
    """A folder with the wheels' packages, for PYTHONPATH; the machine's own come after it."""
    site = tempfile.mkdtemp(prefix="wheels_")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", site, *map(str, wheels.glob("*.whl"))], check=True)
    return site


def supervise(
    parts: list[str],
    arguments: argparse.Namespace,
    folder: Path,
    environment: dict[str, str],
    seconds: float,
) -> list[str]:
    """Run the parts in one process, ended when one takes too long; those still to be run."""
    command = [sys.executable, __file__, "--worker", str(folder), "--only", ",".join(parts)]
    command += ["--seconds", str(seconds)] + (["--smoke"] if arguments.smoke else [])
    end = time.monotonic() + seconds
    child = subprocess.Popen(command, env=environment)
    current, since, why = "", time.monotonic(), ""
    try:
        while child.poll() is None:
            time.sleep(0.1)
            running = read_text(folder / "running")
            if running != current:
                current, since = running, time.monotonic()
                collect(folder, Path(arguments.output))
            if current and time.monotonic() - since > PARTS[current]:
                why = f"stopped after its {PARTS[current]} s"
            elif time.monotonic() > end:
                why = f"stopped by the end of the bench's {arguments.seconds:.0f} s"
            if why:
                child.kill()
                break
    finally:
        child.kill()
        child.wait()
    current = read_text(folder / "running")
    if current in parts:  # it did not get to its end
        taken = time.monotonic() - since
        ended = why or f"ended with {child.returncode}"
        note(folder / f"{current}.json", f"{ended}, {taken:.0f} s after its begin")
        return parts[parts.index(current) + 1 :]
    return []


def work(arguments: argparse.Namespace) -> None:
    """In the child: one part after another; `running` names the one that is under way."""
    from bench.gpu_parts import parts

    folder = Path(arguments.worker)
    end = time.monotonic() + arguments.seconds
    for name in arguments.only.split(","):
        if end - time.monotonic() < LEAST_SECONDS:
            break
        (folder / "running").write_text(name)
        parts.run(name, folder / f"{name}.json", arguments.smoke, end)
    (folder / "running").write_text("")


def collect(folder: Path, output: Path) -> list[str]:
    """All parts' results in one file; their names."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    command = " ".join(["python bench/gpu.py", *sys.argv[1:]])
    found = {"command": command, "date": date.today().isoformat(), "parts": parts}
    output.write_text(json.dumps(found, indent=1) + "\n")
    return list(parts)


def note(path: Path, failure: str) -> None:
    """Add to a part's results that it did not end well."""
    found = json.loads(read_text(path) or "{}")
    path.write_text(json.dumps(found | {"failed": [*found.get("failed", []), failure]}) + "\n")


def read_text(path: Path) -> str:
    """A file's text; nothing where there is none yet."""
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
