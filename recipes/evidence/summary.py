"""Turn the reports of compare.sh into a table: mean and standard deviation over seeds."""

import json
import statistics
import sys
from pathlib import Path

COLUMNS = ("map", "top1", "agreement", "ece", "kl", "bcd", "scd", "wcd")
SHARES = ("map", "top1", "agreement")


def main(folder: Path, losses: list[str]) -> None:
    """Print one row a method."""
    write = sys.stdout.write
    columns: list[str] = []
    for loss in losses:
        reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{loss}-[0-9].json"))]
        figures = [report["quality"] | report["teacher"]["fidelity"] for report in reports]
        if not columns:
            columns = [column for column in COLUMNS if column in figures[0]]
            write(f"| student | n | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}\n")
        cells = []
        for column in columns:
            values = [figure[column] * (100 if column in SHARES else 1) for figure in figures]
            digits = 2 if column in SHARES else 4
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        write(f"| {loss} | {len(values)} | {' | '.join(cells)} |\n")
    teacher = reports[0]["teacher"]
    write(f"\nteacher: top-1 {teacher['quality']['top1']:.2%}, {teacher['cost']['parameters']:,} parameters\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
