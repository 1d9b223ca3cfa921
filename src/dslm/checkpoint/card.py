"""The model card of an output: what it was, what was done, what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from dslm.checkpoint.config import DTYPE_NAMES
from dslm.plan import COPYING, DEPTH_METHOD, Plan
from dslm.shrink_plan import SELF, WRITTEN, names_data_set
from dslm.sizes import differing

_EXPLAINED = {
    "reconstruct": "reconstruct: least squares towards the sliced weights, and steps of single blocks, see "
    "how-it-works",
    "slice": "[slice](https://arxiv.org/abs/2407.14679)",
}


def command_of(plan: Plan) -> str:
    """The command that makes this plan again, without the places of files."""
    words = [f"dslm {'down' if plan.shrinks else 'up'} {shlex.quote(plan.model)}"]
    for size, (_, after) in differing(plan.source, plan.target).items():
        words.append("--untie" if size == "tied" else f"--{size.replace('_', '-')} {after}")
    usual = "reconstruct" if plan.shrinks else "hypercloning"
    chosen = (method for method in plan.methods.values() if method != DEPTH_METHOD)  # that one is not chosen
    words.append(f"--method {next(chosen, usual)}")
    if plan.calibration is None and set(plan.methods.values()) & set(COPYING):
        words.append(f"--split {plan.split}" if plan.snr_db is None else f"--snr-db {plan.snr_db:g}")
    if plan.calibration is not None:
        texts = calibration_names(plan.calibration["texts"])
        words += [f"--calibration {shlex.quote(text)}" for text in texts if texts != [SELF]]
        words.append(f"--samples {plan.calibration['samples']}")
        words.append(f"--sequence-length {plan.calibration['length']}")
        if plan.calibration["refine"] is not None:
            words.append(f"--refine {plan.calibration['refine']}")
    words.append(f"--seed {plan.seed}")
    if plan.dtype is not None:
        words.append(f"--dtype {DTYPE_NAMES[plan.dtype]}")
    return " ".join(words)


def calibration_names(texts: Sequence[str]) -> list[str]:
    """What card and record call calibration texts: data sets by their ids, files by their names without their places.

    Files of the same name keep as many of the folders they are in as tell them apart. A file called as what the model
    writes itself, or as a data set, stays a file.
    """
    paths = {text: Path(text) for text in texts if text != SELF and not names_data_set(text)}
    files = {text: path.relative_to(path.anchor).parts for text, path in paths.items()}

    def name(text: str) -> str:
        if text not in files:
            return text
        parts, others = files[text], set(files.values()) - {files[text]}
        enough = (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others))
        found = "/".join(parts[-next(enough, len(parts)) :])
        return f"./{found}" if found == SELF or names_data_set(found) else found

    return [name(text) for text in texts]


def without_places(plan: Plan) -> Plan:
    """The plan as it is recorded: where a file lies is nobody's business."""
    if plan.calibration is None:
        return plan
    texts = calibration_names(plan.calibration["texts"])
    return replace(plan, calibration={**plan.calibration, "texts": texts})


def hub_id_of(model: str) -> str:
    """The hub id in a model's name, without its revision; empty where it is a place or a name alone."""
    return model.partition("@")[0] if model.count("/") == 1 else ""


def front_matter(model: str, source_metadata: Mapping[str, Any], tags: list[str]) -> dict[str, Any]:
    """What a card says to programs.

    Args:
        model: what the output was made from.
        source_metadata: front matter of that model's card, for its licence and languages.
        tags: for the hub.
    """
    metadata: dict[str, Any] = {"base_model": hub_id_of(model)} if hub_id_of(model) else {}
    for key in ("license", "license_name", "license_link", "language"):
        if key in source_metadata:
            metadata[key] = source_metadata[key]
    return metadata | {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def render_card(
    name: str,
    plan: Plan,
    counts: tuple[int, int],
    sources: Mapping[str, str],
    source_metadata: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> str:
    """The card as Markdown.

    Args:
        name: of the output.
        plan: what was done.
        counts: parameters before and after.
        sources: method -> URL of its paper; not used for a shrink, whose methods are explained here.
        source_metadata: front matter of the source's card, for its licence and languages.
        measured: what was measured about the output, by label.
    """
    hub_id, plan = hub_id_of(plan.model), without_places(plan)
    texts = plan.calibration["texts"] if plan.calibration is not None else ()
    metadata = front_matter(plan.model, source_metadata, ["dslm", "resized"])
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    text = (resources.files("dslm.checkpoint") / "card.md.jinja").read_text(encoding="utf-8")
    return template.from_string(text).render(
        name=name,
        plan=plan,
        calibrated_on=[WRITTEN if text == SELF else text for text in texts],
        link=f"https://huggingface.co/{hub_id}" if hub_id else "",
        before=counts[0],
        after=counts[1],
        changes=differing(plan.source, plan.target),
        sources=sources,
        explained=_EXPLAINED,
        copied=set(plan.methods.values()) & set(COPYING),
        command=command_of(plan),
        measured={label: short_figure(value) for label, value in measured.items()},
        front_matter=yaml.safe_dump(metadata, sort_keys=False),
    )


def short_figure(value: Any) -> str:
    """A figure with as many digits as mean something."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
