"""`mindstream bench units`: how exposed the rendered systemd units leave a device, by systemd's own measure.

`systemd-analyze security --offline=true` weighs what a unit may do, from 0 (nothing) to 10 (all): it reads the unit
and knows nothing of the program. The baseline is a unit of the same program without a line of hardening.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import Figures, Progress, machine, silent, versions
from edge import units
from edge.service_table import SERVICES
from protocol.errors import StorageError

_BARE = "[Service]\nType=notify\nExecStart={program} %i\n"


def run(*, quick: bool = False, progress: Progress = silent) -> Figures:
    """Measure; without systemd-analyze every figure is null. Raises StorageError when it prints no figure."""
    names = {**{row.name: units.instance(row.name) for row in SERVICES}, "sleep": units.SLEEP}
    found: dict[str, float | None] = dict.fromkeys(names)
    bare: float | None = None
    if shutil.which("systemd-analyze") is None:
        progress("systemd-analyze is not installed: nothing is measured (apt-get install systemd)")
    else:
        with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as temporary:
            folder = Path(temporary)
            units.write(folder, runner=Path(sys.executable))
            (folder / "bare@.service").write_text(_BARE.format(program=sys.executable))
            bare = _exposure(folder, "bare@service.service")
            for name, unit in names.items():
                found[name] = _exposure(folder, unit)
                progress(f"{unit}: {found[name]}")
    measured = {name: exposure for name, exposure in found.items() if exposure is not None}
    worst = max(measured, key=lambda name: measured[name], default=None)
    return {
        "worst_exposure": None if worst is None else measured[worst],
        "worst_unit": None if worst is None else names[worst],
        **{f"exposure_{name}": exposure for name, exposure in found.items()},
        "bare_exposure": bare,
        "machine": machine(),
        "versions": f"{versions()} systemd {_version() or 'not installed'}",
        "baseline": "bare_exposure: the same program in a unit without any hardening",
    }


def _exposure(folder: Path, unit: str) -> float:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = units.read_exposure(done.stdout)
    if exposure is None:
        raise StorageError(
            f"measuring {unit}: systemd-analyze security printed no exposure: {done.stderr.strip()[:300]}",
            hint="it knows --offline= since systemd 250",
        )
    return exposure


def _version() -> str:
    if shutil.which("systemd-analyze") is None:
        return ""
    done = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"systemd (\S+)", done.stdout)
    return found.group(1) if found else ""
