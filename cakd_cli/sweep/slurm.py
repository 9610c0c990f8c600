"""A sweep as an array of SLURM jobs: a script, submitted where sbatch is."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cakd_cli.errors import HardwareError
from cakd_cli.files import write_text
from cakd_cli.sweep.plan import Unit

_SCRIPT = """\
#!/bin/bash
# A run of a sweep by cakd each; the sweep's command writes this file again for what is left.
# sbatch reads what a cluster wants from its environment: SBATCH_TIMELIMIT, SBATCH_PARTITION, SBATCH_GPUS, ...
#SBATCH --job-name=cakd-sweep --array={array}
#SBATCH --chdir="{here}" --output="{logs}/slurm-%A-%a.txt" --open-mode=append
#SBATCH --signal=USR1@120 --requeue
case "$SLURM_ARRAY_TASK_ID" in
{cases}
*) echo "there is no run $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
srun "${{command[@]}}" --grace 100
code=$?
# Stopped and saved: the queue shall start it again.
if [ "$code" -eq 75 ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"; fi
exit "$code"
"""


def script(units: Sequence[Unit], out: Path, *, jobs: int | None) -> str:
    """Write the batch script: an array of one task a run."""
    cases = "\n".join(
        f"{number}) command=({shlex.join([sys.executable, '-m', 'cakd_cli', *unit.command(out)])}) ;;"
        for number, unit in enumerate(units)
    )
    array = f"0-{len(units) - 1}" + (f"%{jobs}" if jobs else "")
    logs = str(out / "logs").replace("%", "%%")
    return _SCRIPT.format(array=array, here=Path.cwd(), logs=logs, cases=cases)


def submit(units: Sequence[Unit], out: Path, *, jobs: int | None) -> dict[str, Any]:
    """Write the script, and submit it where sbatch is.

    Returns:
        ``script``, ``job`` (none where it was not submitted) and ``said``, a sentence for the user.

    Raises:
        HardwareError: If sbatch refuses it.
    """
    out = out.resolve()
    path = out / "sweep.sbatch"
    (out / "logs").mkdir(parents=True, exist_ok=True)
    write_text(path, script(units, out, jobs=jobs))
    found = shutil.which("sbatch")
    if found is None:
        said = f"sbatch is not here; on a machine that has it: sbatch {shlex.quote(str(path))}"
        return {"script": str(path), "job": None, "said": said}
    done = subprocess.run([found, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HardwareError(f"sbatch: {done.stderr.strip() or done.stdout.strip()}", hint=f"look at {path}")
    job = done.stdout.strip().partition(";")[0]
    said = f"job {job}, {len(units)} runs; when they are done: cakd compare {shlex.quote(str(out))}"
    return {"script": str(path), "job": job, "said": said}
