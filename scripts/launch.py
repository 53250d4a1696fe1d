"""Runs trace_jax on several machines: a Cloud TPU slice, Google Kubernetes Engine, or Slurm.

python scripts/launch.py tpu   --accelerator v5e:4x4 --zone us-west4-a --name NAME  COMMAND
python scripts/launch.py gke   --accelerator v5e:4x4 --image IMAGE --name NAME      COMMAND
python scripts/launch.py slurm --nodes 2 --gpus-per-node 8 --name NAME              COMMAND

COMMAND is for `python -m trace_jax.main`: run --config FILE --workdir gs://BUCKET/RUN --config.section.name=value
--dry-run prints exactly what would be run or applied and touches nothing; --logs follows a run; --delete ends it and
gives the machines back, which nothing else does. Started again with the same workdir, a run continues.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trace_jax.config import ConfigError
from trace_jax.io.files import is_remote
from trace_jax.main import parse
from trace_jax.parallel.topology import Topology, parse_topology
from trace_jax.run.directory import check_export

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("run", "study", "plan")
BASH = ["bash", "-euo", "pipefail", "-c"]  # with the script as argument: ssh would swallow it from standard input
Job = tuple[str, list[str]]  # a text, and the command that takes it


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints or runs one job. Returns its exit code, 2 if something given can't be used."""
    options, command = _parser().parse_known_args(arguments)
    try:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
            raise ConfigError(f"--name is {options.name!r}; expected lower-case letters, digits and -, at most 40.")
        ending = options.logs or options.delete
        text, taker = options.job(options, [] if ending else _checked(command, options))
    except ValueError as error:  # ConfigError among them
        print(f"launch: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(f"launch: dry run; this would be given to {shlex.join(taker)}", file=sys.stderr)
        print(text, end="")
        return 0
    if taker == BASH:
        return subprocess.run([*BASH, text]).returncode
    return subprocess.run(taker, input=text, text=True).returncode


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("launch.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    targets = parser.add_subparsers(required=True, metavar="tpu|gke|slurm")
    for name, job in (("tpu", tpu), ("gke", gke), ("slurm", slurm)):
        target = targets.add_parser(name, help=job.__doc__, description=job.__doc__, allow_abbrev=False)
        target.set_defaults(job=job, target=name)
        target.add_argument("--name", default="trace-jax", help="of the job and what it runs on (%(default)s)")
        target.add_argument("--dry-run", action="store_true", help="print what would be done; touch nothing")
        instead = target.add_mutually_exclusive_group()
        instead.add_argument("--logs", action="store_true", help="follow the log of process 0 instead")
        instead.add_argument("--delete", action="store_true", help="end it and give the machines back instead")
        if name == "slurm":
            target.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
            target.add_argument(
                "--gpus-per-node", type=int, default=1, help="of each machine; a process each (%(default)s)"
            )
            target.add_argument("--python", default=sys.executable, help="interpreter, seen by every node (this one)")
            target.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="more directives")
            continue
        target.add_argument("--accelerator", required=True, help="slice of TPU chips, such as v5e:4x4")
        target.add_argument("--before", metavar="COMMAND", help="run on every host first, such as copying a checkpoint")
        target.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away")
        if name == "tpu":
            target.add_argument("--zone", required=True, help="Google Cloud zone")
            target.add_argument("--project", help="Google Cloud project (that of gcloud's configuration)")
            target.add_argument("--queued", action="store_true", help="wait in the queue for the slice")
        else:
            target.add_argument("--image", help="container image with trace_jax[tpu,gcs] (docs/scaling.md)")
            target.add_argument("--namespace", default="default")
            target.add_argument("--service-account", help="Kubernetes account that may write to the bucket")
    return parser


def _checked(command: list[str], options: argparse.Namespace) -> list[str]:
    """The command for every process. Its settings are read here, so that a mistake costs no machine."""
    name, *rest = command if command and command[0] in COMMANDS else ["run", *command]
    if name == "plan":
        if "--config" not in " ".join(rest):
            raise ConfigError("--config is missing: which experiment to plan for.")
    else:
        if not any(word.split("=")[0] == "--workdir" for word in rest):
            raise ConfigError(f"--workdir is missing: where the {name} goes, for example gs://BUCKET/RUN.")
        experiment = parse([name, *rest])
        workdir, file = experiment.workdir, experiment.config.partition(":")[0]
        check_export(experiment.load_config(), workdir)
        if not (ROOT / file).is_file() or (options.target != "slurm" and Path(file).is_absolute()):
            raise ConfigError(f"--config is {file}; expected a file of this checkout, relative to {ROOT}.")
        if options.target != "slurm" and not is_remote(workdir):
            hosts = parse_topology(options.accelerator).hosts
            if hosts > 1 or options.target == "gke":
                raise ConfigError(
                    f"--workdir is {workdir}, a local disk that {hosts} hosts don't share"
                    f"{' and a pod loses' if options.target == 'gke' else ''}; give an address gs://BUCKET/RUN."
                )
    processes = _processes(options)
    if name != "run" and processes > 1:
        raise ConfigError(f"{name} is one process on one machine, and here are {processes}; only run is for several.")
    return ["-m", "trace_jax.main", name, *rest]


def _processes(options: argparse.Namespace) -> int:
    if options.target != "slurm":
        return parse_topology(options.accelerator).hosts
    if min(options.nodes, options.gpus_per_node) < 1:
        raise ConfigError(f"--nodes {options.nodes}, --gpus-per-node {options.gpus_per_node}: expected 1 or more.")
    return options.nodes * options.gpus_per_node


def _about(topology: Topology) -> str:
    return f"{topology.name}: {topology.chips} chips on {topology.hosts} hosts"


def tpu(options: argparse.Namespace, command: list[str]) -> Job:
    """Makes a Cloud TPU slice if there is none, installs this checkout on every host, runs and follows the log."""
    topology = parse_topology(options.accelerator)
    where = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    kind = "queued-resources" if options.queued else "tpu-vm"

    def gcloud(*words: str) -> str:
        return shlex.join(["gcloud", "compute", "tpus", *words, *where])

    def ssh(worker: str, script: str) -> str:
        return f"{gcloud('tpu-vm', 'ssh', options.name, f'--worker={worker}')} --command={shlex.quote(script)}\n"

    log = ssh("0", "cd trace_jax && tail -n +1 -F run.log --pid=$(cat run.pid)")
    if options.logs:
        return log, BASH
    if options.delete:
        force = ["--force"] if options.queued else []
        return gcloud(kind, "delete", options.name, "--quiet", *force) + "\n", BASH
    make = [options.name, f"--accelerator-type={topology.accelerator_type}", *(["--spot"] if options.spot else [])]
    if options.queued:
        state = gcloud(kind, "describe", options.name, "--format=value(state.state)")
        make = [*make, f"--node-id={options.name}", f"--runtime-version={topology.software}"]
        wait = f"""until state=$({state}); [ "$state" = ACTIVE ]; do
  case "$state" in FAILED | SUSPEND*) echo "the slice is $state" >&2; exit 1 ;; esac
  sleep 30
done
"""
    else:
        make, wait = [*make, f"--version={topology.software}"], ""
    install = (
        "set -e; rm -rf trace_jax/trace_jax; mkdir -p trace_jax; tar xzf trace_jax.tgz -C trace_jax; cd trace_jax; "
        "python3 -m pip install --quiet --user uv; python3 -m uv venv --quiet --allow-existing --python 3.12 .venv; "
        "python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'"
        + (f"; {options.before}" if options.before else "")
    )
    run = (
        "set -e; cd trace_jax; "
        'if kill -0 "$(cat run.pid 2>/dev/null)" 2>/dev/null; then echo "it runs already" >&2; exit 1; fi; '
        f"nohup .venv/bin/python {shlex.join(command)} >run.log 2>&1 </dev/null & echo $! >run.pid"
    )
    return (
        f"""cd {shlex.quote(str(ROOT))}
# The slice, {_about(topology)}
{gcloud(kind, "describe", options.name)} >/dev/null 2>&1 ||
  {gcloud(kind, "create", *make)}
{wait}# This checkout, on every host; their own Python is too old, so uv brings one
archive=$(mktemp -d)/trace_jax.tgz
git ls-files -z --cached --others --exclude-standard --deduplicate |
  tar --null --ignore-failed-read -czf "$archive" -T -
{gcloud("tpu-vm", "scp")} --worker=all "$archive" {options.name}:
{ssh("all", install)}# One process a host; they find each other, and go on when the connection from here is lost
{ssh("all", run)}{log}""",
        BASH,
    )


def gke(options: argparse.Namespace, command: list[str]) -> Job:
    """Applies a JobSet to the cluster of kubectl: one slice, a pod on each of its hosts, restarted when it is lost."""
    topology = parse_topology(options.accelerator)
    pod = f"jobset.sigs.k8s.io/jobset-name={options.name},batch.kubernetes.io/job-completion-index=0"
    kubectl = f"kubectl --namespace {shlex.quote(options.namespace)}"
    if options.logs:
        return f"{kubectl} logs --follow --selector {pod}\n", BASH
    if options.delete:
        return f"{kubectl} delete jobset {options.name}\n", BASH
    if not options.image:
        raise ConfigError("--image is missing: a container image with trace_jax[tpu,gcs] and the configs.")
    words = ["python", *command]
    if options.before:
        words = ["bash", "-ec", f"{options.before}; exec {shlex.join(words)}"]
    spot = tolerations = account = ""
    if options.spot:
        spot = '\n              cloud.google.com/gke-spot: "true"'
        tolerations = """
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}"""
    if options.service_account:
        account = f"\n            serviceAccountName: {json.dumps(options.service_account)}"
    xpk = ["--workload", options.name, "--tpu-type", topology.accelerator_type, "--docker-image", options.image]
    return (
        f"""# {_about(topology)}. The cluster needs JobSet and a node pool of {topology.machine_type} machines.
# With XPK: xpk workload create --cluster CLUSTER {shlex.join(xpk)} --command {shlex.quote(shlex.join(words))}
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {json.dumps(options.name)}
  namespace: {json.dumps(options.namespace)}
spec:
  failurePolicy:
    maxRestarts: 10  # the run continues from its workdir
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: {topology.hosts}
        completions: {topology.hosts}
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120{account}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {topology.gke_accelerator}
              cloud.google.com/gke-tpu-topology: {json.dumps(topology.shape)}{spot}{tolerations}
            containers:
            - name: trace-jax
              image: {json.dumps(options.image)}
              command: {json.dumps(words)}
              ports:
              - containerPort: 8471  # between the hosts of a slice
              - containerPort: 8482  # where process 0 is found
              resources:
                requests: {{google.com/tpu: {topology.chips_per_host}}}
                limits: {{google.com/tpu: {topology.chips_per_host}}}
""",
        ["kubectl", "apply", "-f", "-"],
    )


def slurm(options: argparse.Namespace, command: list[str]) -> Job:
    """Submits a batch script: one process a GPU, told before its time is over, continued when requeued."""
    log = f"{options.name}.log"
    if options.logs:
        return f"tail -n +1 -F {log}\n", BASH
    if options.delete:
        return f"scancel --name={options.name} --me\n", BASH
    more = "".join(f"#SBATCH --{directive}\n" for directive in options.sbatch)
    return (
        f"""#!/bin/bash
#SBATCH --job-name={options.name}
#SBATCH --nodes={options.nodes}
#SBATCH --ntasks-per-node={options.gpus_per_node}
#SBATCH --gpus-per-node={options.gpus_per_node}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
{more}# JAX takes one GPU for each task of a node, by SLURM_LOCALID; so every task must see all GPUs of the node.
set -euo pipefail
cd {shlex.quote(str(ROOT))}
srun --kill-on-bad-exit=1 {shlex.join([options.python, *command])}
""",
        ["sbatch"],
    )


if __name__ == "__main__":
    sys.exit(main())
