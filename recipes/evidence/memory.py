"""Compares the runs of memory.sh: accuracy, what the teacher was asked, and wall time."""

import json
import statistics
import sys
from pathlib import Path

Run = tuple[str, str, str]  # memory, loss, seed


def main(out: Path) -> None:
    """Print a table of accuracy and two lines of time."""
    write = sys.stdout.write
    lines = [line.split() for line in (out / "seconds.txt").read_text().splitlines()]
    seconds = {(memory, loss, seed): float(end) - float(begin) for memory, loss, seed, begin, end in lines}
    seeds = sorted({seed for _, _, seed in seconds})
    write("| loss | top-1 %, teacher live | top-1 %, memory | n |\n|---|---|---|---|\n")
    for loss in dict.fromkeys(loss for _, loss, _ in seconds):
        cells = []
        for memory in ("off", "disk"):
            values = [_top1(out, (memory, loss, seed)) for seed in seeds]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        write(f"| {loss} | {' | '.join(cells)} | {len(seeds)} |\n")
    for chosen in (seeds[:2], seeds):
        live, kept = ([run for run in seconds if run[0] == memory and run[2] in chosen] for memory in ("off", "disk"))
        wall, shown = (
            [sum(map(f, runs)) for runs in (live, kept)] for f in (seconds.get, lambda run: _asked(out, run))
        )
        write(
            f"{len(live)} students: {wall[0]:.0f} s live, {wall[1]:.0f} s with memory, ratio {wall[0] / wall[1]:.2f}; "
            f"the teacher was shown {shown[0]:,} images live, {shown[1]:,} with memory\n"
        )


def _top1(out: Path, run: Run) -> float:
    memory, loss, seed = run
    facts = json.loads((out / memory / f"{loss}-{seed}" / "run.json").read_text())
    return float(100 * facts["metrics"]["test"]["top1"])


def _asked(out: Path, run: Run) -> int:
    memory, loss, seed = run
    epochs = (out / memory / f"{loss}-{seed}" / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(epoch)["teacher"]["asked"] for epoch in epochs)


main(Path(sys.argv[1]))
