"""One process of several: runs a list of commands as a launcher would start them, and notes each step's losses.

python ranks.py JOBS.json, with RANK, WORLD_SIZE and LOCAL_RANK set. A job is {"words": [...], "port": 12345,
"stop_after": 3}, the last rank to be asked to stop after so many steps. Beside JOBS.json rank 0 writes results.json:
exit code and losses by step of each.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed

from cakd_cli.engine import loop
from cakd_cli.process import main

torch.set_num_threads(1)
losses = []
original = loop.Trainer.train_step


def noted(self, *arguments):
    before = 0.0 if self.sums is None else self.sums.clone()
    original(self, *arguments)
    losses.append(self.ranks.mean(self.sums - before).tolist())
    if self.ranks.rank == self.ranks.count - 1 and len(losses) == job["stop_after"]:
        os.kill(os.getpid(), signal.SIGTERM)


loop.Trainer.train_step = noted
jobs, results = Path(sys.argv[1]), []
for job in json.loads(jobs.read_text()):
    losses.clear()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(job["port"])}
    sys.argv = ["cakd", *job["words"]]
    try:
        main()
    except SystemExit as stop:
        results.append({"code": stop.code, "losses": list(losses)})
    if distributed.is_initialized():  # left to the end of the process after an error
        distributed.destroy_process_group()
if os.environ.get("RANK", "0") == "0":
    (jobs.parent / "results.json").write_text(json.dumps(results))
