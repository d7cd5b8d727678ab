"""Records the tour of `mindstream demo --once` as docs/tour.svg: python docs/record_tour.py"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from edge.demo import main

if __name__ == "__main__":
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True, force_interactive=False)
    with tempfile.TemporaryDirectory(prefix="mindstream-") as folder:
        code = main(once=True, folder=Path(folder), console=console)
    if code == 0:
        Path(__file__).with_name("tour.svg").write_text(console.export_svg(title="make run"), encoding="utf-8")
    else:
        print(console.export_text(), file=sys.stderr)
    sys.exit(code)
