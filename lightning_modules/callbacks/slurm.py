"""Jobs of SLURM: asking for a new start, and finding what the same job had begun before it was started again."""

import hashlib
import os
import subprocess
from collections.abc import Sequence

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment


def take_over_requeue(trainer: L.Trainer) -> int | None:
    """The signal at which a job is to be requeued, None where it is not. Lightning's own handler is switched off: it
    saves at once, in the midst of a step."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    environment.auto_requeue = False
    return environment.requeue_signal


def requeue() -> str:
    """Ask SLURM to start this job again; what came of it, as a clause of a sentence."""
    line = ["scontrol", "requeue", _job()]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"it is not requeued ({' '.join(line)}: {error.strerror}), so submit it again"
    if done.returncode:
        return f"it is not requeued ({' '.join(line)}: {done.stderr.strip()}), so submit it again"
    return f"job {line[-1]} is requeued"


def run_name(line: Sequence[str]) -> str | None:
    """Name of the run folder that this command line has in this job, whenever the job is started; None outside SLURM.

    SLURM is there where Lightning sees it: under srun, and not in an interactive shell.
    """
    if not SLURMEnvironment.detect():
        return None
    return f"slurm_{_job()}_{hashlib.sha256(' '.join(line).encode()).hexdigest()[:8]}"


def was_requeued() -> bool:
    """Whether this is not the job's first start."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def _job() -> str:
    """The job's id; of an array, where SLURM_JOB_ID may stand for all of it, this task's."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
