"""``dslm gen``: text from a prompt."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from dslm.cli.common import adapter_option, model_argument, open_model, output_options, print_json, remark
from dslm.cli.sampling import random_seed, sampling_options

_DEFAULT_PROMPT = "The capital of France is"


@click.command(short_help="Generate text.")
@model_argument
@click.option(
    "-p", "--prompt", default=_DEFAULT_PROMPT, show_default=True, help="Text to continue; - reads stdin."
)
@adapter_option
@sampling_options(n_predict=100)
@output_options
def command(
    model: str,
    prompt: str,
    adapter: Path | None,
    n_predict: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Generate text: continue a prompt, token by token, on stdout."""
    text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    checkpoint = open_model(model, quiet=quiet, adapter=adapter)
    from dslm.generation import generate
    from dslm.sampler import Sampling

    if seed is None:
        seed = random_seed()
        if temperature > 0:
            remark(f"seed {seed}", quiet=quiet)
    result = generate(
        checkpoint,
        text,
        tokens=n_predict,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        device=device,
        dtype=dtype,
        on_text=None if as_json else _write,
    )
    speed = round(result.tokens_per_second, 2)
    if as_json:
        print_json({**asdict(result), "tokens_per_second": speed})
    else:
        click.echo()
    where = f"{result.device}, {result.dtype}"
    remark(f"{result.tokens} tokens in {result.seconds:.1f} s, {speed:.1f} tokens/s ({where})", quiet=quiet)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
