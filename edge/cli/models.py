"""The command group models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edge.cli.context import EXIT_NOT_FOUND, JsonOption, load, print_json, print_table

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List models, and make one ready to load."""
    if context.invoked_subcommand is None:
        list_models()


@app.command("list")
def list_models(json: JsonOption = False) -> None:
    """List the known models, and where each is on this machine."""
    from edge.models import find, known_models

    config = load()
    folders = [Path(folder) for folder in config.model.folders]
    found = {model.name: find(model.name, folders) for model in known_models()}
    if json:
        print_json(
            [
                {"model": model, "files": files, "ready": files is not None and files.ready}
                for model, files in ((model, found[model.name]) for model in known_models())
            ]
        )
        return
    rows = []
    for model in known_models():
        files = found[model.name]
        if files is None:
            state, where = "absent", model.install or f"put {model.file} into a folder of model.folders"
        else:
            state, where = "ready" if files.ready else "to prepare", f"{files.folder} ({files.reason})"
        mark = "*" if model.name == config.model.name else ""
        rows.append([mark, model.name, state, f"{model.size_bytes / 1e6:.0f} MB", model.licence, where])
    print_table(("", "model", "state", "size", "licence", "where, or how to get it"), rows)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A known model or a folder. Default: model.name.")] = "",
    json: JsonOption = False,
) -> None:
    """Check a model's files and convert them if needed, so that the model runner starts quickly."""
    from edge.models import ensure

    config = load()
    folders = [Path(folder) for folder in config.model.folders]
    files = ensure(
        name or config.model.name, on_progress=lambda line: print(line, file=sys.stderr, flush=True), folders=folders
    )
    if json:
        print_json(files)
    else:
        print(f"{files.name} is ready in {files.folder} ({files.reason})")


@app.command()
def path(name: Annotated[str, typer.Argument(help="A known model or a folder. Default: model.name.")] = "") -> None:
    """Print the folder of a model, for scripts."""
    from edge.models import find

    config = load()
    wanted = name or config.model.name
    files = find(wanted, [Path(folder) for folder in config.model.folders])
    if files is None:
        print(f"error: {wanted} is not on this machine", file=sys.stderr)
        print("hint: `mindstream models list` says how to get it", file=sys.stderr)
        raise typer.Exit(EXIT_NOT_FOUND)
    print(files.folder)
