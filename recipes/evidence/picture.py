"""Draw the picture in the README: cakd demo --json | python recipes/evidence/picture.py recipes/evidence/demo.svg."""

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console

from cakd_cli.report.tables import comparison

console = Console(record=True, width=80, file=io.StringIO())
console.print("$ cakd demo\n")
console.print(comparison(json.load(sys.stdin)["rows"], "360 test digits, mean ± standard deviation of 3 seeds"))
svg = console.export_svg(title="cakd demo")
# Rich names web fonts; the viewer's own monospace serves without the network.
Path(sys.argv[1]).write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")
