"""The SPMD core without Ray: `torchrun --nproc-per-node 2 -m farspan.trainer train_spec.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from farspan.errors import FarspanError, JobError
from farspan.trainer.config import TrainSpec
from farspan.trainer.world import Silent, World


class _StepLines(Silent):
    def event(self, event: str, text: str) -> None:
        del event
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def record(self, record: dict[str, Any]) -> None:
        held_out = record.get("eval_loss")
        sys.stdout.write(
            f"step {record['step']}  loss {record['loss']:.4f}  gnorm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {record['step_s']:.2f} s  {record['tokens_per_s']:.0f} tok/s"
            + (f"  eval {held_out:.4f}" if held_out is not None else "")
            + "\n"
        )
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Train what the TrainSpec in the JSON file given says; the exit code of the command line."""
    from pydantic import ValidationError
    from torch import distributed as dist

    from farspan.trainer.sft import train

    try:
        if len(arguments) != 1:
            raise JobError(
                f"expected one train spec, got {len(arguments)} arguments",
                at="python -m farspan.trainer",
                why="the SPMD core trains exactly one resolved job",
                try_="torchrun -m farspan.trainer outputs/<name>/train_spec.json",
            )
        try:
            spec = TrainSpec.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise JobError(
                "the train spec cannot be read",
                at=arguments[0],
                why=str(error),
                try_="use the train_spec.json that `farspan run` writes into the run folder",
            ) from error
        train(spec, World.from_env(), _StepLines())
    except FarspanError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    finally:
        if dist.is_initialized():  # threads of a group that lives on when the interpreter goes may abort the process
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
