"""Checkpoints of a training that may be killed at any moment: which of them are whole."""

import shutil
from pathlib import Path

from transformers import TrainerCallback

CHECKPOINT_COMPLETE = "checkpoint_complete"


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


__all__ = ["CHECKPOINT_COMPLETE", "CheckpointCompleteCallback", "latest_complete_checkpoint"]
