"""Checkpoints of a training that may be killed at any moment: which are whole; and the model that it ends in."""

import importlib
import shutil
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from transformers import PreTrainedModel, Trainer, TrainerCallback

CHECKPOINT_COMPLETE = "checkpoint_complete"

Model = TypeVar("Model", bound=PreTrainedModel)


class CheckpointCompleteCallback(TrainerCallback):
    """Marks a checkpoint once every file of it is written; only marked ones are resumed from."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / CHECKPOINT_COMPLETE).touch()


def latest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The latest whole checkpoint below `output_dir`; half-written ones, left by a kill, are removed."""
    complete = []
    for checkpoint in Path(output_dir).glob("checkpoint-*"):
        if (checkpoint / CHECKPOINT_COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def train_from_latest(trainer: Trainer) -> None:
    """Trains, after the latest whole checkpoint of the trainer's folder where there is one.

    Raises:
        ValueError: there is not one batch to train on.
    """
    args, rows = trainer.args, len(trainer.train_dataset)
    together = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < together:
        raise ValueError(
            f"{rows} training rows do not fill one batch of {together} on all devices together, and "
            "dataloader_drop_last drops the last: lower per_device_train_batch_size, or keep the last batch."
        )
    trainer.train(resume_from_checkpoint=latest_complete_checkpoint(args.output_dir))
    if "wandb" in args.report_to:  # its callback leaves the run open, and the next training would log to it
        importlib.import_module("wandb").finish()


def whole_model(trainer: Trainer, model_class: type[Model], folder: str | Path) -> Model:
    """The model that was trained, whole on every process: where each holds a shard (FSDP), by a file in `folder`, as
    what is sharded once can be given to no other trainer, nor be read by one process."""
    if not trainer.is_fsdp_enabled:
        return trainer.model
    trainer.save_model(str(folder))
    PartialState().wait_for_everyone()
    return model_class.from_pretrained(folder).to(PartialState().device)


__all__ = [
    "CHECKPOINT_COMPLETE",
    "CheckpointCompleteCallback",
    "latest_complete_checkpoint",
    "train_from_latest",
    "whole_model",
]
