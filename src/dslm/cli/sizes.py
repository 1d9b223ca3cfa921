"""What ``up`` and ``down`` share: options for sizes, what is recorded, and the table of what changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dslm.cli.common import Place, open_model
from dslm.errors import RecipeError
from dslm.places import expanded
from dslm.report.tables import short_count
from dslm.sizes import Sizes, count_parameters, differing

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint
    from dslm.plan import Plan

FREE_BESIDE_PLAN = frozenset(
    {"model", "model_option", "output", "plan_file", "overwrite", "dry_run", "as_json", "quiet"}
)
"""Options that say nothing about the target."""

output_option = click.option(
    "-o",
    "--output",
    type=Place(),
    metavar="OUT",
    help="Folder to write. [default: NAME-SIZE]",
)
plan_option = click.option(
    "--plan", "plan_file", type=Place(), metavar="FILE", help="Do what a plan file says."
)
untie_option = click.option("--untie", is_flag=True, help="Give the output its own table.")
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Of all randomness.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing OUT.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done and write nothing.")


def size_options(words: Sequence[str]) -> Callable[[Any], Any]:
    """Give a command an option for each size, by its config word."""

    def decorate(function: Any) -> Any:
        for word in reversed(words):
            option = f"--{word.replace('_', '-')}"
            function = click.option(option, word, type=int, metavar="N", help=f"Target {word}.")(function)
        return function

    return decorate


def recorded_name(model: str, source: Checkpoint) -> str:
    """What card and record call the source: as it was named, except that the place of a file is nobody's business."""
    is_place = expanded(model).exists() or model.lower().endswith(".gguf")
    return source.name if is_place else model


def refuse_beside_plan(context: click.Context, free: frozenset[str] = FREE_BESIDE_PLAN) -> None:
    """A plan says everything about the target: an option that it would silently overrule is a mistake.

    Raises:
        click.UsageError: an option that is not ``free`` was given.
    """
    for name in context.params.keys() - free:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = next(p.opts[-1] for p in context.command.params if p.name == name)
            raise click.UsageError(
                f"{option} and --plan were given; the plan says everything about the target"
            )


def named_sizes(
    options: Mapping[str, Any],
    words: Sequence[str],
    others: Mapping[str, Any],
    factors: str,
    factored: Mapping[str, Any],
) -> dict[str, int]:
    """The sizes given by name; factors go together with them where they do not overlap, and no other way does.

    Args:
        options: of the command.
        words: the sizes that it takes by name.
        others: other way of asking -> what was given, None if nothing.
        factors: what factors are called.
        factored: size -> its factor, None if there is none.

    Raises:
        RecipeError: two ways were mixed.
    """
    named = {word: options[word] for word in words if options[word] is not None}
    asked = {
        **others,
        factors: next((factor for factor in factored.values() if factor is not None), None),
        "sizes by name": named or None,
    }
    ways = [way for way, given in asked.items() if given is not None]
    if len(ways) > 1 and set(ways) != {factors, "sizes by name"}:
        raise RecipeError(f"{' and '.join(ways)} were given", "ask for the size in one way")
    for word, factor in factored.items():
        if word in named and factor is not None:
            raise RecipeError(
                f"{word} was given by name and by {factors.removesuffix('s')}", "ask for the size in one way"
            )
    return named


def sizes_of(model: str) -> Sizes:
    """The sizes of another model, from its config alone."""
    return open_model(model, weights=False, quiet=True).sizes


def change_facts(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    """What a plan changes and how, for ``--json`` and the table."""
    after = plan.target.into_config(source.family, source.config)
    return {
        "model": source.name,
        "family": source.family.name,
        "changes": {word: list(pair) for word, pair in differing(plan.source, plan.target).items()},
        "parameters": {
            "before": count_parameters(source.family, source.config)["total"],
            "after": count_parameters(source.family, after)["total"],
        },
        "methods": dict(plan.methods),
    }


def default_output(source: Checkpoint, facts: Mapping[str, Any]) -> Path:
    """Where the output goes if nobody says: name and size, in the folder one is in."""
    return Path(f"{source.name.split('/')[-1]}-{short_count(facts['parameters']['after'])}")


def change_rows(
    facts: Mapping[str, Any], relation: Callable[[int, int], str]
) -> list[tuple[str, str, str, str]]:
    """Rows of the table of what changes: name, before, after, and the relation of both in words."""
    before, after = facts["parameters"]["before"], facts["parameters"]["after"]
    rows = [
        (word, f"{a:,}", f"{b:,}", relation(a, b))
        for word, (a, b) in facts["changes"].items()
        if word != "tied"
    ]
    if "tied" in facts["changes"]:
        rows.append(("embeddings", "tied", "untied", ""))
    return [*rows, ("parameters", f"{before:,}", f"{after:,}", relation(before, after))]
