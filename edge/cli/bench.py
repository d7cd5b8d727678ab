"""The command bench."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from edge.cli.context import EXIT_FAILED, load, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.config import Config

BENCHMARKS = ("broker", "bus", "endpoint", "engines", "model", "record", "snapshot", "start", "units")


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.", metavar="NAME")],
    json: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
        typer.Option("--json", metavar="FILE", help="Write the figures there as one flat JSON object; - is stdout."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A short run: shows that it works, its figures mean little.")
    ] = False,
    only: Annotated[
        str,
        typer.Option("--only", metavar="PART,…", help="engines, snapshot: these parts alone; a wrong name lists them."),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME,…",
            help="engines: these models, not the configured one and the families at hand; the first has every figure.",
        ),
    ] = "",
    plot: Annotated[
        Optional[Path],  # noqa: UP045 - as above
        typer.Option("--plot", metavar="FILE", help="engines: an SVG; snapshot: size against fidelity, a PNG."),
    ] = None,
) -> None:
    """Measure this machine. Ratios compare two things that were run alternately in the same call."""
    if name not in BENCHMARKS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(BENCHMARKS)}", param_hint="NAME")
    module = importlib.import_module(f"bench.{name}")

    def progress(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    for option, given in (("--only", only), ("--model", model), ("--plot", plot)):
        if given and name != "engines" and not (name == "snapshot" and option in ("--only", "--plot")):
            raise typer.BadParameter(
                "only `engines` has models, and it and `snapshot` parts and a plot", param_hint=option
            )
    if name == "engines":
        figures = _engines(module, load(), quick, only, model, plot, progress)
    elif name == "model":
        figures = _model(module, load(), quick, progress)
    elif name == "snapshot":
        figures = _snapshot(module, load(), quick, only, plot, progress)
    else:
        figures = module.run(quick=quick, progress=progress)
    if json is not None:
        _write(json, figures)
    if json != Path("-"):
        if name == "snapshot":
            wanted = [[key, _shown(value), *rest] for key, value, *rest in module.wanted_rows(figures)]
            print_table(("figure", name, "wanted", "met"), wanted)
        print_table(("figure", name), [[key, _shown(value)] for key, value in figures.items()])
    if figures.get("failed_parts"):
        print(f"error: not all was measured: {figures['failed_parts']}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)


def _model(module: Any, config: Config, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    from edge.models import ensure

    folders = [Path(folder) for folder in config.model.folders]
    folder = ensure(config.model.name, on_progress=progress, folders=folders).folder
    settings = config.model
    device = "cpu" if settings.device == "auto" else settings.device
    options = module.Options(folder, device=device, dtype=settings.dtype, threads=settings.threads, quick=quick)
    figures: dict[str, Any] = module.run(options, progress)
    return figures


def _snapshot(
    module: Any, config: Config, quick: bool, only: str, plot: Path | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    from edge.files import storage_errors
    from edge.models import default_cache_folder, ensure

    settings = config.model
    folder = ensure(settings.name, on_progress=progress, folders=[Path(each) for each in settings.folders]).folder
    options = module.Options(
        folder,
        default_cache_folder() / "bases",
        device="cpu" if settings.device == "auto" else settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        name=settings.name,
        quick=quick,
        **({"parts": only.split(",")} if only else {}),
    )
    figures: dict[str, Any] = module.run(options, progress)
    if plot is not None:
        picture = importlib.import_module("bench.snapshot.plot").png(figures)
        with storage_errors(f"writing {plot}"):
            plot.write_bytes(picture)
    return figures


def _engines(
    module: Any, config: Config, quick: bool, only: str, model: str, plot: Path | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    from edge.files import storage_errors

    folders = [Path(folder) for folder in config.model.folders]
    names = [name.strip() for name in model.split(",") if name.strip()]
    first, *others = names or [config.model.name]
    options = module.Options(
        module.model_of(first, folders, progress),
        [module.model_of(name, folders, progress) for name in others] if names else module.families(folders, progress),
        threads=config.model.threads,
        quick=quick,
        **({"parts": only.split(",")} if only else {}),
    )
    figures: dict[str, Any] = module.run(options, progress)
    if plot is not None:
        picture = importlib.import_module("bench.engines.plot").svg(figures)
        with storage_errors(f"writing {plot}"):
            plot.write_text(picture, encoding="utf-8")
    return figures


def _shown(value: object) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, figures: dict[str, Any]) -> None:
    import msgspec

    from edge.files import storage_errors

    body = msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n"
    if path == Path("-"):
        sys.stdout.write(body.decode())
        return
    with storage_errors(f"writing {path}"):
        path.write_bytes(body)
