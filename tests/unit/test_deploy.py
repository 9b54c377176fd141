"""What deploy/ holds can be run: manifests have the fields that their API asks for, scripts are Bash, and every command
in them is one that ``abyssal`` takes.  The Slurm script is run with stand-ins for Slurm."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from abyssal.cli import serve, train
from abyssal.cli.arguments import parse
from abyssal.spec.hf_config import read_config
from abyssal.spec.presets import preset
from tests.support.readme import commands

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SLURM = DEPLOY / "slurm" / "train.sbatch"

SRUN = f"""#!{sys.executable}
import itertools, os, signal, subprocess, sys
program = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
nodes = []
signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
for node in range(int(os.environ["SLURM_NNODES"])):
    nodes.append(subprocess.Popen(program, env={{**os.environ, "SLURM_NODEID": str(node)}}))
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCONTROL = """#!/bin/bash
case $1 in
show) echo localhost; echo localhost ;;
requeue) echo "requeued $2" ;;
esac
"""
TORCHRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$HERE/node-${SLURM_NODEID:-0}"
echo "$OMP_NUM_THREADS threads a rank, ${SRUN_CPUS_PER_TASK:-no} cores a node"
if [[ -n ${SLEEP:-} ]]; then exec sleep "$SLEEP"; fi
exit "${STATUS:-0}"
"""


@pytest.fixture
def slurm(tmp_path: Path):
    """Runs the script as job 7 on two nodes of one machine; torchrun notes its arguments, unless it is the real one."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def put(name: str, text: str) -> None:
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    put("srun", SRUN)
    put("scontrol", SCONTROL)

    def start(*arguments: str, real: bool = False, **environment: str) -> subprocess.Popen[str]:
        if not real:
            put("torchrun", TORCHRUN)
        job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"}
        path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        return subprocess.Popen(
            ["bash", str(SLURM), *arguments],
            env={**kept, **job, "PATH": path, "HERE": str(tmp_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def options_of(arguments: list[str]) -> train.Options:
    """Of ``torchrun ... -m abyssal train ...``, which must also be options that torchrun has."""
    from torch.distributed.run import get_args_parser

    split = arguments.index("-m")
    get_args_parser().parse_args([*arguments[:split], "program"])
    assert arguments[split : split + 3] == ["-m", "abyssal", "train"]
    return parse(train.Options, arguments[split + 3 :], "train")


def launched(folder: Path, node: int = 0) -> list[str]:
    return (folder / f"node-{node}").read_text().splitlines()


def test_slurm_starts_a_torchrun_on_each_node(slurm, tmp_path):
    given = ["--out", str(tmp_path / "a run"), "--mesh", "dp=16,ep=8", "--device", "cuda", "--batch-size", "16"]
    job = slurm(*given, SLURM_CPUS_PER_TASK="96")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and "12 threads a rank, 96 cores a node" in output, output
    first, second = launched(tmp_path, 0), launched(tmp_path, 1)
    assert [word.replace("=true", "=false") for word in first] == second
    assert "is_host=true,read_timeout=600" in first and first[first.index("--rdzv-endpoint") + 1] == "localhost:20007"
    options = options_of(first)
    assert options.resume and options.out == tmp_path / "a run"
    assert options.train.parallel.mesh_spec(16, 8).num_nodes == 2


@pytest.mark.parametrize(
    ("environment", "ends", "said"),
    [
        ({"STATUS": "3"}, 0, "requeued 7"),
        ({"STATUS": "3", "SLURM_RESTART_COUNT": "2"}, 0, "queued again, 3 of 3"),
        ({"STATUS": "3", "SLURM_RESTART_COUNT": "3"}, 3, "it ends"),
    ],
)
def test_slurm_queues_a_job_that_failed_again_and_not_for_ever(slurm, environment, ends, said):
    job = slurm("--out", "x", **environment)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == ends and said in output, output
    assert ("requeued 7" in output) == (ends == 0)


def test_slurm_ends_the_ranks_and_queues_again_when_the_time_is_up(slurm, tmp_path):
    """However often it was queued again before."""
    job = slurm("--out", "x", SLEEP="60", SLURM_RESTART_COUNT="9")
    while not (tmp_path / "node-0").exists() or not (tmp_path / "node-1").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)  # what --signal=B:USR1 has Slurm do
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 0 and "time is up" in output and "requeued 7" in output, output


def test_the_example_in_the_slurm_script_is_one_that_trains():
    comment = re.search(r"#   sbatch .*?(?=\n#\n)", SLURM.read_text(), re.DOTALL)
    assert comment is not None
    words = shlex.split(comment[0].replace("\\\n#", " ").removeprefix("#"))
    options = parse(train.Options, words[words.index("deploy/slurm/train.sbatch") + 1 :], "train")
    check_fits(options, nodes=int(words[words.index("--nodes") + 1]), ranks_per_node=8)


def check_fits(options: train.Options, nodes: int, ranks_per_node: int) -> None:
    """The mesh is of the ranks that are started, and the batch and the experts divide over it."""
    mesh = options.train.parallel.mesh_spec(nodes * ranks_per_node, ranks_per_node)
    spec = preset(options.model) if options.init is None else read_config(options.init)
    assert options.train.batch_size % (mesh.dp * (options.train.micro_batch_size or 1)) == 0
    assert spec.moe is not None and spec.moe.num_experts % mesh.ep == 0


def documents(name: str) -> dict[str, dict[str, Any]]:
    """By kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())}


JOB_SET_SPEC = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "suspend", "coordinator", "managedBy"}
LEADER_WORKER_SET_SPEC = {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"}
LEADER_WORKER_TEMPLATE = {"leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy"}
"""Fields of jobset.x-k8s.io/v1alpha2 and leaderworkerset.x-k8s.io/v1."""


def check_pod(pod: dict[str, Any], claims: set[str]) -> dict[str, Any]:
    """The only container, whose volumes are all there."""
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claimed = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert set(claimed) == claims
    assert container["image"] and container["resources"]["requests"].keys() >= {"cpu", "memory"}
    return container


def test_the_job_set_restarts_as_one_and_meets_at_its_first_pod(tmp_path):
    found = documents("train-jobset.yaml")
    claim, job_set = found["PersistentVolumeClaim"], found["JobSet"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "all ranks write to one file system"
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    spec = job_set["spec"]
    assert set(spec) <= JOB_SET_SPEC and spec["network"]["enableDNSHostnames"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["completionMode"], job["backoffLimit"], replicated["replicas"]) == ("Indexed", 0, 1)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy asks for it"
    container = check_pod(pod, {claim["metadata"]["name"]})
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    nodes, ranks = int(variables["NODES"]), int(variables["RANKS_PER_NODE"])
    assert job["parallelism"] == job["completions"] == nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(ranks)
    host, port = f"{job_set['metadata']['name']}-{replicated['name']}-0-0.{job_set['metadata']['name']}", 29400
    assert port in [port["containerPort"] for port in container["ports"]]
    for index in range(nodes):
        arguments = stub_torchrun(container, {**variables, "JOB_COMPLETION_INDEX": str(index)}, tmp_path)
        assert arguments[arguments.index("--rdzv-endpoint") + 1] == f"{host}:{port}"
        is_host = "true" if index == 0 else "false"
        assert arguments[arguments.index("--rdzv-conf") + 1].split(",")[0] == f"is_host={is_host}"
        options = options_of(arguments)
        assert options.resume and options.out.parts[1] == "shared"
        check_fits(options, nodes, ranks)


def stub_torchrun(container: dict[str, Any], variables: dict[str, str], folder: Path) -> list[str]:
    """What the container's command would start."""
    program = folder / "torchrun"
    program.write_text(TORCHRUN)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {**variables, "HERE": str(folder), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([*container["command"], *container["args"]], env=environment, check=True, timeout=20)
    return launched(folder)


def test_the_leader_worker_set_serves_on_one_machine_a_group():
    found = documents("serve-lws.yaml")
    workers, service = found["LeaderWorkerSet"], found["Service"]
    assert workers["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    template = workers["spec"]["leaderWorkerTemplate"]
    assert set(workers["spec"]) <= LEADER_WORKER_SET_SPEC and set(template) <= LEADER_WORKER_TEMPLATE
    assert template["size"] == 1, "a server is one machine"
    labels = template["workerTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= {**labels, "leaderworkerset.sigs.k8s.io/worker-index": "0"}.items()
    pod = template["workerTemplate"]["spec"]
    container = check_pod(pod, {"abyssal"})
    program, verb, *arguments = container["command"] + container["args"]
    assert (program, verb) == ("abyssal", "serve")
    options = parse(serve.Options, arguments, "serve")
    assert options.host == "0.0.0.0" and options.open and options.port == container["ports"][0]["containerPort"]
    assert pod["terminationGracePeriodSeconds"] > options.drain_seconds
    names = {port["name"] for port in container["ports"]}
    probes = [container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["port"] for probe in probes} | {service["spec"]["ports"][0]["targetPort"]} == names
    assert [probe["path"] for probe in probes] == ["/ready", "/ready", "/health"]


def test_scripts_are_bash():
    for script in DEPLOY.rglob("*.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for path in line.split()[:-1]]
    assert {"pyproject.toml", "setup.py", "src", "csrc"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    extras = re.search(r'"\.\[(.*)\]"', text)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))


def test_commands_of_the_page_exist():
    page = (DEPLOY / "README.md").read_text()
    for command in commands(page):
        _, verb, *arguments = shlex.split(command.text)
        parse({"train": train.Options, "serve": serve.Options}[verb], arguments, verb)
    for path in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (DEPLOY / path).exists(), path


@pytest.mark.slow
def test_slurm_trains_on_two_nodes(slurm, tmp_path):
    """Two ranks that meet over loopback as two nodes would, with the real torchrun."""
    out = tmp_path / "run"
    job = slurm(
        *("--out", str(out), "--model", "tiny", "--steps", "3", "--batch-size", "2", "--seq-len", "32"),
        *("--vocab-size", "300", "--mesh", "dp=2,ep=2", "--dispatch", "hierarchical"),
        *("--data", str(ROOT / "docs" / "paper.md"), str(ROOT / "README.md")),
        real=True,
        SLURM_JOB_ID=str(os.getpid()),
        RANKS_PER_NODE="1",
        RESTARTS="0",
        REQUEUES="0",
    )
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "step" for line in lines) == 3
    assert (out / "model" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in Linux's /proc")
def test_slurm_s_ranks_that_are_killed_go_on_from_their_checkpoint(slurm, tmp_path):
    """Both torchruns meet again and start their ranks again; the run ends as if nothing had happened."""
    out = tmp_path / "run"
    job = slurm(
        *("--out", str(out), "--model", "tiny", "--steps", "60", "--save-every", "5", "--batch-size", "2"),
        *("--seq-len", "32", "--vocab-size", "300", "--mesh", "dp=2,ep=2"),
        *("--data", str(ROOT / "docs" / "paper.md"), str(ROOT / "README.md")),
        real=True,
        SLURM_JOB_ID=str(os.getpid() + 1),
        RANKS_PER_NODE="1",
        RESTARTS="1",
        REQUEUES="0",
    )
    while not list((out / "checkpoints").glob("step-*")) and job.poll() is None:
        time.sleep(0.05)
    os.kill(pid_of_rank(job.pid, 1), signal.SIGKILL)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "rank 1 of 2" in output and "is gone" in output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 61))
    assert any(line["event"] == "resume" for line in lines)


def pid_of_rank(ancestor: int, rank: int) -> int:
    """The process of ``rank`` among those that ``ancestor`` started, directly or not."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables and ancestor in ancestors(process):
                return int(process.name)
        except OSError:  # it has ended meanwhile, or is not ours to read
            continue
    raise AssertionError(f"no rank {rank}")


def ancestors(process: Path) -> set[int]:
    found: set[int] = set()
    while process.name != "0":
        parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        found.add(parent)
        process = process.parent / str(parent)
    return found
