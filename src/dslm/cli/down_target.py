"""Which sizes ``dslm down`` was asked for, by any of its options, and the search among shapes of about one size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dslm.cli.common import progress_bar
from dslm.cli.sizes import named_sizes, sizes_of
from dslm.errors import RecipeError
from dslm.plan import SHRUNK
from dslm.sizes import Sizes, count_parameters
from dslm.targets import like, parse_count
from dslm.targets_down import divided, parse_divisor, parse_share, shrink_candidates

if TYPE_CHECKING:
    from dslm.checkpoint.reader import Checkpoint
    from dslm.shrink.search import Scored


def target_sizes(source: Checkpoint, options: dict[str, Any]) -> Sizes:
    """The sizes that the command's options ask for.

    Raises:
        RecipeError: two ways of asking were mixed.
        SizeError: what is asked for is not legal.
    """
    hidden_by, ffn_by = options["embed_dim_divisor"], options["up_proj_divisor"]
    others = {"--params": options["params"], "--keep-ratio": options["keep_ratio"]}
    named = named_sizes(
        options,
        SHRUNK,
        others | {"--like": options["like_model"]},
        "divisors",
        {"hidden_size": hidden_by, "intermediate_size": ffn_by},
    )
    family, config = source.family, source.config
    if options["params"] is not None or options["keep_ratio"] is not None:
        wanted = wanted_parameters(source, options)
        return shrink_candidates(family, config, wanted, untie=options["untie"])[0].sizes
    if options["like_model"] is not None:
        return like(source.sizes, sizes_of(options["like_model"]))
    hidden = parse_divisor("1" if hidden_by is None else hidden_by)
    intermediate = parse_divisor("1" if ffn_by is None else ffn_by)
    return divided(family, config, hidden, intermediate).with_named(family, named)


def wanted_parameters(source: Checkpoint, options: dict[str, Any]) -> int:
    """The number of parameters asked for."""
    if options["params"] is not None:
        return parse_count(options["params"])
    return round(parse_share(options["keep_ratio"]) * count_parameters(source.family, source.config)["total"])


def check_search(
    source: Checkpoint, target: Sizes, options: dict[str, Any], output: Path | None, *, overwrite: bool
) -> None:
    """Refuse what cannot be before a long search for shapes about as large as a target.

    Raises:
        RecipeError: the size was asked for in another way.
        CheckpointError: the output place is not usable.
    """
    if options["params"] is None and options["keep_ratio"] is None:
        raise RecipeError("--search has nothing to choose from", "give --params or --keep-ratio with it")
    if output is not None:
        from dslm.output import check_place, planned

        tensors = planned(source, target.into_config(source.family, source.config), None)
        check_place(source, tensors, output, overwrite=overwrite)


def search_shapes(
    source: Checkpoint, options: dict[str, Any], device: str, output: Path | None, *, quiet: bool
) -> list[Scored]:
    """Shapes near the number of parameters that was asked for, the best of those that were built first.

    They are built beside the output, where there is to be one.
    """
    from dslm.checkpoint.writer import folder_above
    from dslm.shrink.recipe import Recipe
    from dslm.shrink.search import read_windows, search
    from dslm.shrink.weights import Stored

    # What is built to compare takes no more than the usual ones.
    steps = 0 if options["refine"] == 0 else None
    with progress_bar(quiet=quiet) as progress:
        windows = read_windows(
            source,
            options["calibration"],
            samples=options["samples"],
            length=options["sequence_length"],
            seed=options["seed"],
            device=device,
            progress=progress,
        )
        found = search(
            Stored(source),
            wanted_parameters(source, options),
            windows,
            build=options["search"],
            untie=options["untie"],
            recipe=Recipe.with_steps(steps, solve=options["method"] != "slice"),
            device=device,
            folder=None if output is None else folder_above(output),
            progress=progress,
        )
    return found.shapes
