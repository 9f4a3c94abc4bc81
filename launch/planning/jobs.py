"""Job files for a cluster's scheduler: checked, complete, and ready to submit.

    python launch/plan.py job --scheduler slurm --config configs/410m.json --nodes 4
    python launch/plan.py job --scheduler slurm --config configs/3m.json --array train.seed=1,2,3
    python launch/plan.py job --scheduler kubernetes --config configs/410m.json --nodes 2
    python launch/plan.py job --scheduler hostfile --config configs/410m.json --hosts a,b

The file is printed, or written where --output says. Every task of an array has a run folder and
settings of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launch import cli

NAME = 40  # characters of a configuration's name; a pod's, with more to it, may have 63
RESTARTS = 20  # of one job, after failures; stops for time limits and preemptions don't count


@dataclass(frozen=True)
class Task:
    """One run of a job: its folder and what it overrides of the configuration."""

    folder: str
    settings: list[str]

    def arguments(self, config: str) -> list[str]:
        """pretrain.py's command line."""
        words = ["--config", config, "--run-dir", self.folder, "--resume", "auto"]
        return words + [word for setting in self.settings for word in ("--set", setting)]


def main(arguments: list[str]) -> None:
    """Read the command line, check the runs, and print their job file."""
    options = parser().parse_args(arguments)
    refuse_unused(options)
    tasks = make_tasks(options.config, options.set, options.array, options.run_dir)
    check(options.config, tasks, options.nodes * options.gpus_per_node)
    text = WRITERS[options.scheduler](options, tasks)
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
        print(f"wrote {options.output}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = cli.verb_parser(__doc__)
    result.prog = "plan.py job"
    cli.add_configuration(result)
    result.add_argument("--scheduler", choices=WRITERS, required=True, help="who starts the ranks")
    result.add_argument("--nodes", type=cli.whole(1, 100_000), default=1, help="(default: 1)")
    result.add_argument("--gpus-per-node", type=cli.whole(1, 64), default=8, help="(default: 8)")
    result.add_argument(
        "--array",
        nargs="+",
        default=[],
        metavar="KEY=V1,V2",
        help="one run for each value, and for each combination where several keys are given",
    )
    cli.add_run_folder(result)
    result.add_argument("--time", type=time_limit, help="slurm: time limit (default: 24:00:00)")
    result.add_argument("--image", type=image, help="kubernetes: container (default: l2e:0.1.0)")
    result.add_argument(
        "--hosts",
        type=cli.named,
        help="hostfile: names, a comma between them (default: node-1,node-2,...)",
    )
    result.add_argument("--output", type=cli.path, metavar="FILE", help="default: print it")
    return result


def time_limit(text: str) -> str:
    """An argparse type: a time as Slurm writes it."""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|(?i:unlimited)", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write hours:minutes:seconds, or days-hours")
    return text


def image(text: str) -> str:
    """An argparse type: a container's image, as registry/name:tag."""
    if not re.fullmatch(r"\w[\w./:@-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of an image, as registry/name:tag")
    return text


def refuse_unused(options: argparse.Namespace) -> None:
    """Raise ValueError for an option that the scheduler's file has no place for."""
    for name, scheduler in (("time", "slurm"), ("image", "kubernetes"), ("hosts", "hostfile")):
        if getattr(options, name) is not None and options.scheduler != scheduler:
            raise ValueError(f"--{name} is for --scheduler {scheduler}: leave it out")


def make_tasks(
    config: str, settings: list[str], array: list[str], folder: Path | None
) -> list[Task]:
    """The runs: one, or one for each combination of the array's values.

    Raises:
        ValueError: an array's key has no values.
    """
    base = str(folder or Path("runs") / Path(config).stem)
    axes: list[list[str]] = []
    for axis in array:
        key, equals, text = axis.partition("=")
        values = at_commas(text)
        if not key or not equals or not all(map(str.strip, values)):
            raise ValueError(f"--array {axis}: give KEY=VALUE,VALUE,... such as train.seed=1,2,3")
        if any(others[0].startswith(f"{key}=") for others in axes):
            raise ValueError(f"--array: {key} is there twice; write --array {key}=VALUE,VALUE,...")
        axes.append([f"{key}={value}" for value in values])
    if not axes:
        return [Task(base, settings)]
    tasks = []
    for chosen in itertools.product(*axes):
        name = ",".join(re.sub(r"[^\w.=+-]", "_", setting) for setting in chosen)
        tasks.append(Task(f"{base}/{name}", [*settings, *chosen]))
    if len({task.folder for task in tasks}) != len(tasks):
        raise ValueError(f"--array {' '.join(array)}: two tasks would write into the same folder")
    return tasks


def at_commas(text: str) -> list[str]:
    """The values between commas; those within brackets or quotes belong to one value."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += (character in "[{") - (character in "]}") if not quoted else 0
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def check(config: str, tasks: list[Task], ranks: int) -> None:
    """Every task's configuration, on so many ranks.

    Raises:
        ValueError: with all mistakes of the first task that has any.
    """
    import configs  # brings the schema, for which --help should not wait

    for task in tasks:
        configs.load(config, task.settings, processes=ranks)


def slurm(
    options: argparse.Namespace, tasks: list[Task], program: str = "launch/pretrain.py"
) -> str:
    """A batch script that goes on by itself after time limits, preemptions and failures.

    program: what trains a task's run, given pretrain.py's arguments.
    """
    array = len(tasks) > 1
    name = re.sub(r"[^\w.-]+", "-", Path(options.config).stem)  # which sbatch would split
    header = {
        "job-name": f"l2e-{name}",
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": 8,
        "time": options.time or "24:00:00",
        "signal": "USR1@120",
        "output": "%x-%A_%a.log" if array else "%x-%j.log",
        "open-mode": "append",
    }
    if array:
        header["array"] = f"0-{len(tasks) - 1}"
    lines = [f"#SBATCH --{key}={value}" for key, value in header.items()]
    return SLURM.format(
        header="\n".join([*lines, "#SBATCH --requeue"]),
        tasks="\n".join(
            f"    {shlex.quote(shlex.join(t.arguments(options.config)))}" for t in tasks
        ),
        folders="\n".join(f"    {shlex.quote(task.folder)}" for task in tasks),
        last=len(tasks) - 1,
        restarts=RESTARTS,
        program=shlex.quote(program),
    )


SLURM = """#!/bin/bash
# Written by plan.py job. Submit it from the repository's root: sbatch THIS_FILE
#
# Slurm warns 120 s before the time limit; the run then saves a checkpoint and leaves, and the job
# puts itself back into the queue and goes on from there. So it does after a rank or a node failed.

{header}

set -uo pipefail
cd "${{SLURM_SUBMIT_DIR:?start this script with sbatch}}"

TASKS=(
{tasks}
)
FOLDERS=(
{folders}
)
TASK=${{SLURM_ARRAY_TASK_ID:-0}}
if [ "$TASK" -gt {last} ]; then
    echo "task $TASK: this file has the tasks 0 to {last}; write another one by plan.py job" >&2
    exit 2
fi
eval "ARGUMENTS=(${{TASKS[$TASK]}})"
RUN=${{FOLDERS[$TASK]}}
PYTHON=${{PYTHON:-.venv/bin/python}}

# srun gives every rank its number; the trainer finds the first node and a port by itself.
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}
srun --kill-on-bad-exit=1 "$PYTHON" {program} "${{ARGUMENTS[@]}}"
STATUS=$?

# A run that is not at its end has no such mark. Status 2 is a mistake that would come again.
if [ ! -e "$RUN/finished" ] && [ "$STATUS" -ne 2 ]; then
    if [ "$STATUS" -eq 0 ] || [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
        scontrol requeue "${{SLURM_JOB_ID}}"
    fi
fi
exit "$STATUS"
"""


def kubernetes(options: argparse.Namespace, tasks: list[Task]) -> str:
    """For each run an Indexed Job, one pod a node, and the service by which the pods meet."""
    parts = []
    for number, task in enumerate(tasks):
        stem = re.sub(r"[^a-z0-9]+", "-", Path(options.config).stem.lower())[:NAME].strip("-")
        name = "-".join(filter(None, ("l2e", stem, str(number) if len(tasks) > 1 else "")))
        arguments = Task(on_volume(task.folder), task.settings).arguments(options.config)
        command = [
            "torchrun",
            f"--nnodes={options.nodes}",
            f"--nproc-per-node={options.gpus_per_node}",
            "--node-rank=$(JOB_COMPLETION_INDEX)",
            f"--master-addr={name}-0.{name}",
            "--master-port=29400",
            "launch/pretrain.py",
            *(word.replace("$(", "$$(") for word in arguments),  # no variable of the pod
        ]
        parts.append(
            KUBERNETES.format(
                name=name,
                nodes=options.nodes,
                gpus=options.gpus_per_node,
                image=options.image or "l2e:0.1.0",
                command="\n".join(f"            - {json.dumps(word)}" for word in command),
                restarts=RESTARTS * options.nodes,
            )
        )
    return "---\n".join(parts)


def on_volume(folder: str) -> str:
    """Where a run's folder lies in the pods, which share /runs alone. Raises ValueError."""
    path = os.path.normpath(os.path.join("/runs", folder.removeprefix("runs/")))
    if not path.startswith("/runs/"):
        raise ValueError(f"--run-dir {folder}: in the pods only /runs stays; name a folder in it")
    return path


KUBERNETES = """# Written by plan.py job. Submit it with: kubectl apply -f THIS_FILE
# The run's folder lies on the volume claim l2e-runs, which all pods share. A pod that fails is
# started again where it was; the others notice, leave, and meet it there.
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completions: {nodes}
  parallelism: {nodes}
  completionMode: Indexed
  backoffLimit: {restarts}
  template:
    spec:
      subdomain: {name}
      restartPolicy: OnFailure
      terminationGracePeriodSeconds: 120
      containers:
        - name: pretrain
          image: {image}
          command:
{command}
          lifecycle:
            preStop:
              exec:  # the run saves and leaves; the pod ends when it has
                command: ["sh", "-c", "kill -TERM 1; while kill -0 1; do sleep 1; done"]
          resources:
            limits:
              nvidia.com/gpu: {gpus}
          volumeMounts:
            - {{name: runs, mountPath: /runs}}
            - {{name: memory, mountPath: /dev/shm}}
      volumes:
        - name: runs
          persistentVolumeClaim: {{claimName: l2e-runs}}
        - name: memory
          emptyDir: {{medium: Memory}}
"""


def hostfile(options: argparse.Namespace, tasks: list[Task]) -> str:
    """A hostfile for deepspeed, with the command that uses it.

    Raises:
        ValueError: the hosts are not as many as the nodes, or there are several runs.
    """
    hosts = [f"node-{number + 1}" for number in range(options.nodes)]
    if options.hosts:
        hosts = [host.strip() for host in options.hosts.split(",")]
    wrong = [host for host in hosts if not re.fullmatch(r"[\w.:-]+", host, re.ASCII)]
    if wrong or len(set(hosts)) < len(hosts):
        reason = f"{wrong[0]!r} is no host's name" if wrong else "a host is there twice"
        raise ValueError(f"--hosts {options.hosts}: {reason}; write each by its name, once")
    if len(hosts) != options.nodes:
        raise ValueError(
            f"--hosts {options.hosts}: {len(hosts)} hosts, but --nodes {options.nodes}"
        )
    if len(tasks) > 1:
        raise ValueError("--array: a hostfile has no queue; use --scheduler slurm or kubernetes")
    arguments = shlex.join(tasks[0].arguments(options.config))
    head = (
        "# Written by plan.py job. Each host is reached by ssh without a password, through pdsh:\n"
        f"# deepspeed --hostfile THIS_FILE launch/pretrain.py {arguments}\n"
    )
    return head + "".join(f"{host} slots={options.gpus_per_node}\n" for host in hosts)


WRITERS = {"slurm": slurm, "kubernetes": kubernetes, "hostfile": hostfile}
