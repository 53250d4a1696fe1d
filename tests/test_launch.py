"""What the launchers would run: checked as text, and the Cloud TPU script run for real against a gcloud of ours."""

import os
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
launch = runpy.run_path(str(ROOT / "scripts" / "launch.py"))["main"]

RUN = ["run", "--config", "configs/quickstart.py", "--workdir", "gs://bucket/a run", "--config.unlearning.steps=7"]
QUOTED = (
    "-m trace_jax.main run --config configs/quickstart.py --workdir 'gs://bucket/a run' --config.unlearning.steps=7"
)
BEFORE = ["--before", "gcloud storage cp -r gs://b/olmoe /tmp/olmoe"]
TPU = ["tpu", "--zone", "us-west4-a", "--accelerator"]
GKE = ["gke", "--image", "registry/trace:1", "--accelerator"]


@pytest.fixture
def dry_run(capsys):
    def text(*arguments, shell=True):
        assert launch([*arguments, "--dry-run"]) == 0
        said = capsys.readouterr().out
        checked = subprocess.run(["bash", "-n"], input=said if shell else "", text=True, capture_output=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr
        return said

    return text


def test_cloud_tpu_makes_a_slice_installs_runs_and_follows(dry_run):
    text = dry_run(*TPU, "v5e:4x4", "--name", "olmoe", "--project", "p", "--spot", *BEFORE, *RUN)
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("gcloud")]
    describe, create, copy, install, run, follow = lines
    assert "16 chips on 4 hosts" in text and describe.endswith("||")
    assert "tpu-vm create olmoe --accelerator-type=v5litepod-16 --spot --version=v2-alpha-tpuv5-lite" in create
    assert all("--zone=us-west4-a --project=p" in line for line in lines)
    assert all("--worker=all" in line for line in (copy, install, run)) and "--worker=0" in follow
    assert QUOTED in run.replace("'\"'\"'", "'")
    assert install.endswith("cp -r gs://b/olmoe /tmp/olmoe'")
    assert "delete" not in text and "queued" not in text


def test_a_queued_slice_is_waited_for(dry_run):
    text = dry_run(*TPU, "v5p:2x2x4", "--queued", *RUN)
    assert "queued-resources create trace-jax --accelerator-type=v5p-32 --node-id=trace-jax" in text
    assert "--runtime-version=v2-alpha-tpuv5 " in text and '[ "$state" = ACTIVE ]' in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TPU, "v5e:4x4", "--delete"], "gcloud compute tpus tpu-vm delete trace-jax --quiet --zone=us-west4-a"),
        ([*TPU, "v5e:4x4", "--queued", "--delete"], "queued-resources delete trace-jax --quiet --force --zone=us"),
        ([*TPU, "v5e:4x4", "--logs"], "--command='cd trace_jax && tail -n +1 -F run.log"),
        ([*GKE, "v5e:4x4", "--delete"], "kubectl --namespace default delete jobset trace-jax"),
        ([*GKE, "v5e:4x4", "--logs"], "jobset-name=trace-jax,batch.kubernetes.io/job-completion-index=0"),
        (["slurm", "--delete"], "scancel --name=trace-jax --me"),
        (["slurm", "--logs"], "tail -n +1 -F"),
    ],
)
def test_logs_and_deletion_are_one_command_each_and_need_no_experiment(dry_run, arguments, words):
    text = dry_run(*arguments)
    assert words in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("accelerator", "pods", "chips", "gke", "topology"),
    [
        ("v5e:4x4", 4, 4, "tpu-v5-lite-podslice", "4x4"),
        ("v6e:2x4", 1, 8, "tpu-v6e-slice", "2x4"),
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice", "4x4x4"),
    ],
)
def test_a_jobset_has_a_pod_for_every_host(dry_run, accelerator, pods, chips, gke, topology):
    def jobset_of(*arguments):
        jobset = yaml.safe_load(dry_run(*GKE, accelerator, *arguments, *RUN, shell=False))
        (job,) = jobset["spec"]["replicatedJobs"]
        return jobset, job, job["template"]["spec"]["template"]["spec"]

    jobset, job, pod = jobset_of("--name", "olmoe", "--spot", "--service-account", "writer")
    assert (jobset["kind"], jobset["metadata"]) == ("JobSet", {"name": "olmoe", "namespace": "default"})
    assert job["replicas"] == 1
    assert (job["template"]["spec"]["parallelism"], job["template"]["spec"]["completions"]) == (pods, pods)
    assert pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": gke,
        "cloud.google.com/gke-tpu-topology": topology,
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "trace_jax.main", *RUN]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    (changed,) = jobset_of(*BEFORE)[2]["containers"]
    assert changed["command"] == ["bash", "-ec", f"{BEFORE[1]}; exec python {QUOTED}"]
    assert "# With XPK: xpk workload create" in dry_run(*GKE, accelerator, *RUN, shell=False)
    assert "tolerations" not in str(jobset_of()) and "serviceAccountName" not in str(jobset_of())


def test_slurm_has_a_process_for_every_gpu(dry_run):
    text = dry_run(
        "slurm", "--nodes", "2", "--gpus-per-node", "8", "--python", "py", "--sbatch", "partition=h100", *RUN
    )
    directives = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=h100", "requeue"} <= set(directives)
    assert text.startswith("#!/bin/bash\n#SBATCH") and f"cd {ROOT}\n" in text
    assert text.endswith(f"srun --kill-on-bad-exit=1 py {QUOTED}\n")


def test_commands_and_shared_disks_pass_through(dry_run):
    study = ["study", "--config", "configs/quickstart.py", "--workdir", "runs/a"]
    assert "trace_jax.main study --config" in dry_run(*TPU, "v5e:2x4", *study)
    assert "trace_jax.main plan --config" in dry_run(*TPU, "v5e:1x1", "plan", "--config", "configs/quickstart.py")
    assert "trace_jax.main run --config" in dry_run("slurm", "--nodes", "4", *study[1:])  # run if none is named


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TPU, "v9z:4x4", *RUN], "'v9z:4x4': v9z is no kind of TPU known here"),
        ([*TPU, "v5e:4x5", *RUN], "one of 1x1, 2x2"),
        ([*TPU, "v5e:4x4", "run", "--config", "configs/quickstart.py"], "--workdir is missing"),
        ([*TPU, "v5e:4x4", *RUN[:3], "--workdir", "runs/a"], "a local disk that 4 hosts don't share"),
        ([*GKE, "v5e:1x1", *RUN[:3], "--workdir=runs/a"], "and a pod loses"),
        ([*TPU, "v5e:4x4", *RUN, "--config.unlearning.step=1"], "did you mean 'steps'"),
        ([*TPU, "v5e:4x4", *RUN[:2], "/absent.py", *RUN[3:]], "no such config file"),
        ([*TPU, "v5e:4x4", *RUN[:2], str(ROOT / RUN[2]), *RUN[3:]], "expected a file of this checkout"),
        ([*TPU, "v5e:4x4", *RUN, "--config.export=uniform"], "Pass --config.export=None"),
        ([*TPU, "v5e:4x4", "study", *RUN[1:]], "study is one process on one machine, and here are 4"),
        (["slurm", "--gpus-per-node", "8", "study", *RUN[1:]], "here are 8"),
        (["slurm", "--nodes", "0", *RUN], "--nodes 0, --gpus-per-node 1: expected 1 or more"),
        (["gke", "--accelerator", "v5e:4x4", *RUN], "--image is missing"),
        ([*TPU, "v5e:4x4", "--name", "My run", *RUN], "--name is 'My run'; expected lower-case"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_rented(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    assert launch(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and not out


GCLOUD = """#!/bin/bash
echo "$4 $5" >>"$WORKER/calls"
case "$4" in
  describe) exit 1 ;;
  scp) for word; do case "$word" in *.tgz) cp "$word" "$WORKER/home" ;; esac; done ;;
  ssh) for word; do case "$word" in
    --command=*) cd "$WORKER/home" && PATH="$WORKER/bin:$PATH" exec bash -c "${word#--command=}" ;;
  esac; done ;;
esac
"""


def test_the_cloud_tpu_script_does_what_it_says(tmp_path, monkeypatch):
    """With gcloud, the installation and the interpreter of the host replaced, the rest is real."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "home" / "trace_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    programs = {tmp_path / "bin" / "gcloud": GCLOUD, tmp_path / "bin" / "python3": "#!/bin/bash\n"}
    programs[python] = '#!/bin/bash\necho "started in $PWD"; printf "<%s>" "$@"; sleep 2; echo done\n'
    for file, text in programs.items():
        file.write_text(text)
        file.chmod(0o755)
    monkeypatch.setenv("WORKER", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert launch([*TPU, "v5e:4x4", "--name", "olmoe", *RUN]) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["describe olmoe", "create olmoe", f"scp {calls[2].split()[1]}", *["ssh olmoe"] * 3]
    home = tmp_path / "home" / "trace_jax"
    assert (home / "configs" / "quickstart.py").exists() and (home / "trace_jax" / "main.py").exists()
    words = "".join(f"<{word}>" for word in ["-m", "trace_jax.main", *RUN])
    assert (home / "run.log").read_text() == f"started in {home}\n{words}done\n"
