"""The documentation is true: generated pages are current, links lead somewhere, snippets and commands work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from edge import docs
from edge.cli.app import app
from edge.config import load_config

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path for path in (*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")) if not path.name.startswith(".")
)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def blocks(language: str) -> Iterator[Any]:
    """Every fenced block of one language, as a test parameter."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match.group(1) == language:
                line = text.count("\n", 0, match.start()) + 1
                yield pytest.param(match.group(2), id=f"{page.relative_to(CHECKOUT)}:{line}")


def commands_shown() -> Iterator[Any]:
    """Every command line in a shell block that begins with ``mindstream``."""
    for parameter in blocks("sh"):
        for line in parameter.values[0].replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"(\.venv/bin/)?mindstream\b", line):
                yield pytest.param(line, id=f"{parameter.id} {line[:40]}")


def commands_in_prose() -> Iterator[Any]:
    """Every `mindstream …` in running text that names a command."""
    for page in PAGES:
        prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for words in sorted(set(re.findall(r"`mindstream ([a-z][a-z ]*)", prose))):
            yield pytest.param(words.split(), id=f"{page.name} {words}")


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown page has."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+\s+(.+)$", _FENCE.sub("", text), re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)"', text))


def test_the_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge.docs", "--check"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[:4000] + done.stderr


def test_a_stale_page_is_found_shown_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    page = tmp_path / "configuration.md"
    page.write_text(page.read_text().replace("restart_limit", "restart_limt"))
    capsys.readouterr()
    assert docs.main(["--check"]) == 1
    shown = capsys.readouterr()
    assert "restart_limt" in shown.out
    assert "configuration.md" in shown.err
    assert "restart_limt" in page.read_text()  # --check writes nothing
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0


def test_the_clients_shown_are_the_clients_that_are_run() -> None:
    page = (CHECKOUT / "docs" / "clients.md").read_text("utf-8")
    programs = [path for path in (CHECKOUT / "examples" / "clients").iterdir() if path.suffix in (".py", ".mjs", ".sh")]
    assert len(programs) >= 5
    for path in programs:
        assert f"\n{path.read_text('utf-8')}```\n" in page, path.name


def test_every_command_and_option_says_what_it_does() -> None:
    for path, command in docs.commands():
        assert (command.help or "").strip(), path
        for parameter in command.params:
            assert parameter.help or parameter.name in ("help", "json"), (path, parameter.name)


def test_every_command_that_prints_data_has_json() -> None:
    without = {
        "up",
        "demo",
        "decode",  # it prints nothing but JSON
        "mindstream models path",
        "mindstream keys trust",
        "mindstream keys forget",
        "mindstream config path",
        "mindstream units render",
        "mindstream broker render device",
        "mindstream broker render hub",
        "mindstream broker user add",
        "mindstream broker user rm",
        "mindstream broker certificate",
    }
    for path, command in docs.commands():
        if hasattr(command, "commands") or path[-1] in without or " ".join(path) in without:
            continue
        assert any("--json" in parameter.opts for parameter in command.params), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("text", list(blocks("toml")))
def test_toml_snippets_are_configurations(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mindstream.toml"
    path.write_text(text)
    load_config(path, {})


@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_snippets_compile(text: str) -> None:
    compile(text, "snippet", "exec")


@pytest.mark.parametrize("line", list(commands_shown()))
def test_commands_shown_are_commands(line: str) -> None:
    words = shlex.split(line.split(" | ")[0], comments=True)[1:]
    _parse(typer.main.get_command(app), words)


@pytest.mark.parametrize("words", list(commands_in_prose()))
def test_commands_named_in_prose_exist(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    assert words[0] in command.commands
    group = command.commands[words[0]]
    if len(words) > 1 and hasattr(group, "commands"):
        assert words[1] in group.commands


def _parse(command: Any, words: list[str]) -> None:
    """Parse a command line as the program would, and run nothing. Raises a usage error."""
    context = command.make_context("mindstream", list(words), resilient_parsing=False)
    # What a group has not taken for itself belongs to the command that it names.
    rest = [*getattr(context, "_protected_args", []), *context.args]
    if hasattr(command, "commands") and rest:
        name, found, left = command.resolve_command(context, rest)
        assert found is not None, name
        _parse(found, left)
