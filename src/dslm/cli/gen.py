"""``dslm gen``: text from a prompt."""

from __future__ import annotations

import random
import sys
from dataclasses import asdict

import click

from dslm.cli.common import model_argument, open_model, output_options, print_json, remark

_DEFAULT_PROMPT = "The capital of France is"


@click.command(short_help="Generate text.")
@model_argument
@click.option(
    "-p", "--prompt", default=_DEFAULT_PROMPT, show_default=True, help="Text to continue; - reads stdin."
)
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Most tokens to write.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="Higher is more varied; 0 always takes the likeliest token.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    help="Draw among this many tokens; 0: among all.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.9,
    show_default=True,
    help="Draw among the likeliest tokens with this share of the probability; 1: all.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Start of the random numbers; random if not given.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="Where to run.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Numbers to compute with; auto: as stored.",
)
@output_options
def command(
    model: str,
    prompt: str,
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
    checkpoint = open_model(model, quiet=quiet)
    from dslm.generation import Sampling, generate

    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
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
