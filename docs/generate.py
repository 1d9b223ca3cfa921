"""Generates the pages that follow from the code: the CLI reference and the table of families.

``--check`` writes nothing and fails when a page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import click

from dslm.cli.main import cli
from dslm.families import family_names, load_family

DOCS = Path(__file__).parent
BLOCKS = {
    "pre": "norm before each branch",
    "post": "norm after each branch",
    "sandwich": "norm before and after each branch",
    "parallel": "attention and FFN side by side",
}
HEAD_DIM = {
    "declared": "free",
    "accepted": "free in transformers; some serving engines derive it",
    "derived": "always hidden_size / num_attention_heads",
}


def cli_page() -> str:
    """Every command's ``--help``."""
    context = click.Context(cli, info_name="dslm")
    parts = ["# Command line\n\nGenerated from `--help` by `make docs`.\n", _help(cli, context)]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts.append(f"## dslm {name}\n")
        parts.append(_help(command, click.Context(command, info_name=name, parent=context)))
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context) -> str:
    context.terminal_width = context.max_content_width = 100
    return f"```\n{command.get_help(context).strip()}\n```\n"


def families_page() -> str:
    """What the tables say, a row each."""
    lines = [
        "# Families",
        "",
        "Generated from the tables in `src/dslm/families` by `make docs`. A tensor or config key that a table does",
        "not know is refused by name. [Adding a family](adding-a-family.md) is one such table.",
        "",
        "| family | models | architecture | norm | blocks | head_dim |",
        "|---|---|---|---|---|---|",
    ]
    for name in family_names():
        family = load_family(name)
        norm = {"rms": "RMSNorm", "layer": "LayerNorm"}[family.norm]
        lines.append(
            f"| `{name}` | [{family.title}]({family.source}) | `{family.architecture}` | {norm} "
            f"| {BLOCKS[family.blocks]} | {HEAD_DIM[family.head_dim]} |"
        )
    for name in family_names():
        family = load_family(name)
        lines += ["", f"## {family.title}", "", "| tensor | axes |", "|---|---|"]
        for template, alternatives in family.tensors.items():
            lines += [f"| `{template}` | `{spec.text}` |" for spec in alternatives]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check both pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, text in (("cli.md", cli_page()), ("families.md", families_page())):
        path = DOCS / name
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"out of date: {', '.join(stale)}; run make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
