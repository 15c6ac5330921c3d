"""Prints docs/cli.md from the command line's own definition; `--write` puts it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from generated import say_or_write

from dominie.cli import app

PAGE = Path(__file__).parent / "cli.md"

_BEFORE = """# The command line

`python docs/cli_reference.py --write` made this page of the program itself; `dominie VERB --help`
says the same.

| exit status | |
|---|---|
| 0 | done |
| 1 | the run failed though its input was acceptable: a loss that is not finite, a full disk |
| 2 | recipe, data, model or option are at fault; nothing was spent. [Every message](errors.md) |
| 130, 143 | interrupted, and saved: the same command goes on from there |

With `--json`, stdout is one object, and everything else goes to stderr. `dominie --debug VERB …`
shows the traceback of an error.
"""


def page() -> str:
    """The page of today's verbs."""
    group: Any = typer.main.get_command(app)
    shown = {name: verb for name, verb in group.commands.items() if not verb.hidden}
    summary = [f"| [`{name}`](#{name}) | {_first(verb.help)} |" for name, verb in shown.items()]
    head = "\n".join(["", "| verb | |", "|---|---|", *summary, ""])
    return "\n".join([_BEFORE + head, *(_section(name, verb) for name, verb in shown.items())])


def unexplained() -> list[str]:
    """Options and arguments without a word of help."""
    group: Any = typer.main.get_command(app)
    return [
        f"{name} {parameter.name}"
        for name, verb in group.commands.items()
        for parameter in verb.params
        if not parameter.help
    ]


def _section(name: str, verb: Any) -> str:
    arguments = [each for each in verb.params if each.param_type_name == "argument"]
    options = [each for each in verb.params if each.param_type_name == "option"]
    usage = " ".join(["dominie", name, *(["[OPTIONS]"] if options else []), *map(_used, arguments)])
    lines = [f"## {name}", "", str(verb.help).strip(), "", "```text", usage, "```", ""]
    lines += ["| | default | |", "|---|---|---|"]
    for each in (*arguments, *options):
        names = [_metavar(each)] if each in arguments else [*each.opts, *each.secondary_opts]
        value = f" {_metavar(each)}" if each in options and _metavar(each) else ""
        written = ", ".join(f"`{known}{value}`" for known in names)
        lines.append(f"| {written} | {_default(each)} | {each.help} |")
    if verb.epilog:
        lines += ["", verb.epilog]
    return "\n".join([*lines, ""])


def _used(argument: Any) -> str:
    name = _metavar(argument)
    several = "" if argument.nargs == 1 or name.endswith("…") else "…"
    return f"{name}{several}" if argument.required else f"[{name}{several}]"


def _metavar(parameter: Any) -> str:
    return (parameter.metavar or ("" if getattr(parameter, "is_flag", False) else "VALUE")).upper()


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or value == "" or callable(value):
        return ""
    return f"`{'yes' if value is True else value}`"


def _first(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


if __name__ == "__main__":
    say_or_write(PAGE, page())
