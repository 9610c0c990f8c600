"""Turn the reports of compare.sh into a table: mean and standard deviation over seeds."""

import json
import statistics
import sys
from pathlib import Path

COLUMNS = ("top1", "agreement", "ece", "kl", "bcd", "scd", "wcd")
SHARES = ("top1", "agreement")


def main(folder: Path) -> None:
    """Print one row a method."""
    write = sys.stdout.write
    write(f"| student | n | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}\n")
    for loss in ("cross-entropy", "kd", "dkd", "cakd"):
        reports = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{loss}-*.json"))]
        figures = [report["quality"] | report["teacher"]["fidelity"] for report in reports]
        cells = []
        for column in COLUMNS:
            values = [figure[column] * (100 if column in SHARES else 1) for figure in figures]
            digits = 2 if column in SHARES else 4
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        write(f"| {loss} | {len(values)} | {' | '.join(cells)} |\n")
    teacher = reports[0]["teacher"]
    write(f"\nteacher: top-1 {teacher['quality']['top1']:.2%}, {teacher['cost']['parameters']:,} parameters\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
