"""A training run from end to end: data, model, Trainer, output."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dslm.checkpoint.fingerprint import weights_hash
from dslm.checkpoint.reader import Checkpoint
from dslm.checkpoint.writer import check_output
from dslm.errors import RecipeError
from dslm.families import Tensor
from dslm.grow.maps import Growth
from dslm.load import check_token_ids, load_model, load_tokenizer, need, silence_transformers
from dslm.places import expanded
from dslm.progress import Progress
from dslm.shrink_plan import names_data_set
from dslm.texts import CHARACTERS, read_rows
from dslm.train.adapters import add_adapters, load_four_bit, merge_adapter
from dslm.train.data import Blocks, Document, hold_out, read_blocks, read_tokens, separates
from dslm.train.growth import NEW, Scale, chosen_recipe, freeze_old, growth_scale, recorded_growth
from dslm.train.loss import Distillation, give_loss
from dslm.train.record import Trained, run_record
from dslm.train.runs import as_the_first, check_run, check_untouched, enough_for, prepare_run, run_folder
from dslm.train.save import save_adapter, save_plain, table_lines
from dslm.train.settings import Training, check_training
from dslm.train.teacher import open_teacher

log = logging.getLogger(__name__)

_HUB_TOKENS = 1_000_000  # read of a data set on the hub where nobody says how many


def train_checkpoint(
    checkpoint: Checkpoint,
    asked: Training,
    out: Path,
    *,
    base: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    in_place: bool = False,
    progress: Progress | None = None,
    on_evaluation: Callable[[Any], None] | None = None,
) -> Trained:
    """Train a model and write it, or its adapter.

    Under ``torchrun`` or ``accelerate launch`` every process calls this; the first one writes. Until the output is
    whole, checkpoints and metrics are in ``OUT.run``, from where an interrupted run goes on.

    Args:
        checkpoint: the model, opened with its weights.
        asked: how to train.
        out: folder to write.
        base: what card and adapter call the model; its name if None.
        resume: go on with an interrupted run.
        overwrite: replace an existing folder, and drop an unfinished run.
        in_place: ``out`` is the model itself, which is replaced when the run is over.
        progress: called with a label, steps done and steps in all.
        on_evaluation: called with each `dslm.train.watch.Evaluation`.

    Raises:
        RecipeError: what was asked for does not fit together, or the data cannot be used.
        CheckpointError: the output place is not usable, or the model is broken.
        MissingExtraError: a package is not installed.
        VerificationError: the loss or a gradient became NaN or infinite.
        OutOfMemoryError: the memory was not enough.
    """
    begin = time.monotonic()
    check_training(asked)
    need_packages(asked)
    from dslm.train.arrange import arrange, count_steps

    nbytes = 0 if asked.adapts and not asked.merge else checkpoint.nbytes
    check_output(out, None if in_place else checkpoint.folder, nbytes, overwrite=overwrite or in_place)
    read = [expanded(place) for place in (*asked.data, asked.eval_data, asked.teacher) if place]
    check_untouched([out, run_folder(out)], read)
    check_untouched([run_folder(out)], [checkpoint.folder] if checkpoint.folder else [])
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cutting = [
        name for name in ("FSDP", "DeepSpeed") if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")
    ]
    if asked.freeze_old and cutting:
        what = "--freeze-old holds parts of matrices still"
        raise RecipeError(f"{what}, which {cutting[0]} cuts up", f"leave out {cutting[0]}")
    if "DeepSpeed" in cutting:  # otherwise ZeRO 3 refuses to gather the output, after the whole run
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"
    processes = PartialState(cpu=asked.device == "cpu")
    as_the_first(processes, lambda: check_run(run_folder(out), resume=resume, overwrite=overwrite))
    with enough_for(asked):
        ready = _prepare(checkpoint, asked, processes, progress)

    def place() -> Path | None:
        facts = asked.as_dict() | {
            "model": checkpoint.name,
            "weights": weights_hash(checkpoint),
            "teacher_weights": None if ready.teacher is None else weights_hash(ready.teacher),
            "blocks": _fingerprint(ready.blocks),
            "eval_blocks": _fingerprint(ready.held_out),
            "processes": processes.num_processes,
            "recipe": ready.recipe,
        }
        # A run that ended and could not write its output takes its last steps once more.
        below = count_steps(asked, ready.blocks, processes.num_processes)
        return prepare_run(run_folder(out), facts, below=below, resume=resume, overwrite=overwrite)

    point = as_the_first(processes, place)
    with enough_for(asked, run_folder(out), alone=processes.num_processes == 1):
        trainer, watch = arrange(
            ready.model, ready.tokenizer, asked, ready.blocks, ready.held_out, ready.scales, run_folder(out),
            progress=progress, on_evaluation=on_evaluation,
        )  # fmt: skip
        perplexity = _run(trainer, watch, point)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, whatever cut it up
    result = Trained(
        folder=out,
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        learning=ready.learning,
        perplexity=perplexity,
        seconds=time.monotonic() - begin,
        apart=ready.apart,
    )
    if processes.is_main_process:
        run = run_record(asked, ready.recipe, result, base or checkpoint.name)
        _write(checkpoint, asked, ready, state, out, run, overwrite=overwrite or in_place, progress=progress)
    processes.wait_for_everyone()
    return result


@dataclass(frozen=True, slots=True)
class _Ready:
    """A model that can be trained, and what on.

    Attributes:
        model: with its loss and adapters.
        tokenizer: of the model.
        lines: parameter name -> its line of the family's table; empty for adapters.
        scales: parameter name -> how its rate differs.
        learning: how many numbers can learn.
        teacher: what it learns from, if anything.
        blocks: to train on.
        held_out: to evaluate on.
        apart: whether the model keeps documents in a block apart.
        recipe: ``plain`` or ``growth``.
    """

    model: Any
    tokenizer: Any
    lines: Mapping[str, Tensor]
    scales: Mapping[str, Scale]
    learning: int
    teacher: Checkpoint | None
    blocks: Blocks
    held_out: Blocks
    apart: bool
    recipe: str


def need_packages(asked: Training) -> None:
    """Refuse a run whose packages are not all there.

    Raises:
        MissingExtraError: one is not installed.
    """
    need("accelerate", "train", "training")
    need("matplotlib", "train", "the picture of the loss")
    if asked.adapts:
        need("peft", "train", f"--{asked.mode}")
    if asked.mode == "qlora":
        need("bitsandbytes", "qlora", "--qlora")


def _prepare(checkpoint: Checkpoint, asked: Training, processes: Any, progress: Progress | None) -> _Ready:
    """Everything that is read before the first step."""
    teacher = None if asked.teacher is None else open_teacher(checkpoint, asked.teacher, progress)
    recipe = chosen_recipe(checkpoint, asked)
    growth = recorded_growth(checkpoint) if recipe == "growth" or asked.freeze_old else None
    tokenizer = load_tokenizer(checkpoint)
    documents, what = _documents(checkpoint, tokenizer, asked, processes.num_processes, progress)
    device = processes.device.type
    model = _model(checkpoint, asked, device)
    apart = separates(model)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    filler = next(i for i in ids if i is not None and i < checkpoint.sizes.vocab_size)
    length = _block_length(checkpoint, asked)
    blocks, held_out = read_blocks(documents, length, filler=filler, apart=apart, what=what)
    learn = None
    if teacher is not None:
        if teacher.context is not None and teacher.context < length:
            raise RecipeError(
                f"the teacher {teacher.name} reads {teacher.context} tokens at most, and a block has {length}",
                f"give --block-size {teacher.context}",
            )
        taught = load_model(teacher, device=device).requires_grad_(False)
        learn = Distillation(taught, asked.temperature, asked.kl_weight)
    give_loss(model, learn)
    lines = {} if asked.adapts else table_lines(model, checkpoint)
    if asked.adapts:
        model = add_adapters(model, asked)
    scales: Mapping[str, Scale] = {}
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if growth is not None:
        scales = _rates(lines, growth, recipe, freeze=asked.freeze_old)
    if growth is not None and asked.freeze_old:
        named = dict(model.named_parameters())
        learning = freeze_old([(named[name], line) for name, line in lines.items()], growth)
        if learning == 0:
            raise RecipeError("growing added nothing that could learn", "leave out --freeze-old")
    return _Ready(model, tokenizer, lines, scales, learning, teacher, blocks, held_out, apart, recipe)


def check_data(checkpoint: Checkpoint, asked: Training, progress: Progress | None = None) -> None:
    """Refuse a run or its text, before something long goes ahead of the run.

    Raises:
        RecipeError: what is asked for does not fit together, or the text cannot be read, or is too short.
        CheckpointError: the model has no tokenizer, or not one that fits.
    """
    check_training(asked)
    documents, what = _documents(checkpoint, load_tokenizer(checkpoint), asked, 1, progress)
    read_blocks(documents, _block_length(checkpoint, asked), filler=0, apart=False, what=what)


def _block_length(checkpoint: Checkpoint, asked: Training) -> int:
    return min(asked.block_size, checkpoint.context or asked.block_size)


def _documents(
    checkpoint: Checkpoint, tokenizer: Any, asked: Training, processes: int, progress: Progress | None
) -> tuple[tuple[list[Document], list[Document]], tuple[str, str | None]]:
    """What to train on and what to evaluate on, and in words what they are; None for a share that is held out."""
    per_step = asked.batch_size * asked.gradient_accumulation * processes * asked.block_size
    wanted = asked.tokens or (asked.max_steps or 0) * per_step or _HUB_TOKENS
    characters = CHARACTERS * round(wanted / (1 - asked.held_out))
    sets = [source for source in asked.data if names_data_set(source)]
    if sets and not (asked.tokens or asked.max_steps):
        log.info(
            "of %s no more is read than about %s tokens; --tokens says how many",
            ", ".join(sets),
            f"{wanted:,}",
        )

    def tokens(source: str) -> tuple[list[Document], str]:
        rows, origin = read_rows(source, characters, progress)
        found = read_tokens(tokenizer, rows, checkpoint.name, progress)
        check_token_ids(checkpoint.name, checkpoint.sizes.vocab_size, (int(one.ids.max()) for one in found))
        return found, origin

    read = [tokens(source) for source in asked.data]
    documents, what = [one for found, _ in read for one in found], ", ".join(origin for _, origin in read)
    if asked.eval_data is None:
        return hold_out(documents, asked.held_out, asked.seed), (what, None)
    others, other = tokens(asked.eval_data)
    return (documents, others), (what, other)


def _model(checkpoint: Checkpoint, asked: Training, device: str) -> Any:
    silence_transformers()
    torch.manual_seed(asked.seed)
    if asked.mode == "qlora":
        return load_four_bit(checkpoint, device)
    return load_model(checkpoint, dtype="float32", device=device)


def _rates(lines: Mapping[str, Tensor], growth: Growth, recipe: str, *, freeze: bool) -> dict[str, Scale]:
    """How the rates of a grown model's parameters differ."""
    if freeze:
        # All that learns is new; decay needs no gradient and would wear down what is frozen.
        scale = Scale(NEW, new=1.0) if recipe == "growth" else Scale()
        return dict.fromkeys(lines, replace(scale, decay=0.0))
    return {name: growth_scale(line, growth) for name, line in lines.items()}


def _run(trainer: Any, watch: Any, point: Path | None) -> tuple[float, float]:
    """Train; held-out perplexity before and after."""
    trainer.args.eval_on_start = point is None
    try:
        with watch.listening():
            trainer.train(resume_from_checkpoint=None if point is None else str(point))
        if watch.interrupted:
            raise KeyboardInterrupt
        found = [line for line in trainer.state.log_history if "eval_perplexity" in line]
        last = found[-1] if found and found[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    finally:  # a run that stopped has a picture too
        if trainer.is_world_process_zero():
            with suppress(OSError):  # a full disk is told by what stopped the run, or by writing the output
                watch.draw()
    return found[0]["eval_perplexity"] if found else last["eval_perplexity"], last["eval_perplexity"]


def _fingerprint(blocks: Blocks) -> str:
    return hashlib.sha256(blocks.ids.tobytes() + blocks.labels.tobytes()).hexdigest()[:16]


def _write(
    checkpoint: Checkpoint,
    asked: Training,
    ready: _Ready,
    state: Mapping[str, torch.Tensor],
    out: Path,
    run: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: Progress | None,
) -> None:
    from dslm.train.watch import METRICS, PICTURE

    folder, lines = run_folder(out), ready.lines
    extra = {name: folder / name for name in (METRICS, PICTURE) if (folder / name).is_file()}
    if asked.adapts:
        adapter = folder / "adapter"
        ready.model.peft_config["default"].base_model_name_or_path = run["base"]
        # Otherwise peft looks for the base on the hub.
        ready.model.save_pretrained(adapter, state_dict=state, save_embedding_layers=False)
        if not asked.merge:
            save_adapter(checkpoint, adapter, out, run, extra, overwrite=overwrite)
            shutil.rmtree(folder)
            return
        merged = merge_adapter(checkpoint, adapter)
        lines, state = table_lines(merged, checkpoint), merged.state_dict()
        extra["adapter"] = adapter
    save_plain(checkpoint, state, lines, out, run, extra, overwrite=overwrite, progress=progress)
    shutil.rmtree(folder)
