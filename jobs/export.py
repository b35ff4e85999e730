"""`farspan export`: find the run and the step, let the trainer write and check the folder, say where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from farspan.errors import JobError
from farspan.trainer.adapters.config import inner
from farspan.trainer.config import RandomModel, TrainSpec, is_prepared
from farspan.trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from farspan.trainer.export import ExportReport


def export(
    folder: RunFolder,
    *,
    step: int | None = None,
    out: Path | None = None,
    merged: bool = False,
    whole_base: bool = False,
) -> ExportReport:
    """Write a checkpoint of a run as a HF or PEFT folder, reopened and compared.

    Args:
        step: which checkpoint; None: the newest.
        out: where to; None: `<run>/export/step_<n>`, with `-merged` for a merged adapter.
        merged: fold the adapter into the base's weights.
        whole_base: write the rounded base as a plain model too.

    Raises:
        JobError: no such checkpoint, a merge without an adapter, or a base that was not rounded before the run.
        CheckpointError: the checkpoint is damaged, or what was written is not what was saved.
    """
    from farspan.trainer.checkpoint_format import read_manifest

    checkpoint = find_checkpoint(folder, step)
    manifest = read_manifest(checkpoint)
    spec = TrainSpec.model_validate(manifest.job)
    if merged and inner(spec.adapter).type == "full":
        raise JobError(
            "nothing to merge",
            at="--merged",
            why="the run trained every weight, so its export is a whole model already",
            try_="leave --merged out",
        )
    if whole_base and (merged or not is_prepared(spec.base, spec.adapter)):
        raise JobError(
            "there is no rounded base to write",
            at="--whole-base",
            why="it is in the merged model" if merged else "the run's adapter opens on the model it was trained from",
            try_="leave --whole-base out",
        )
    from farspan.trainer.checkpoint import with_range
    from farspan.trainer.data.store import TokenStore
    from farspan.trainer.export import export_checkpoint

    target = out or folder.root / "export" / (checkpoint.name + ("-merged" if merged else ""))
    return export_checkpoint(
        checkpoint,
        target.expanduser().absolute(),
        model=spec.model,
        adapter=with_range(spec.adapter, manifest.progress),
        base_model_dir=folder.base_model if isinstance(spec.model, RandomModel) else None,
        tokenizer_dir=TokenStore(Path(spec.tokens_dir)).tokenizer_dir,
        dtype=spec.precision,
        merged=merged,
        seed=spec.optim.seed,
        stored=spec.base,
        start=folder.adapter_start,
        prepared=folder.prepared_base if is_prepared(spec.base, spec.adapter) else None,
        whole_base=whole_base,
    )


def find_run(ref: str) -> RunFolder:
    """The run folder that `ref` means: its path, or the name of a run below `outputs`.

    Raises:
        JobError: there is no such run.
    """
    places = [Path(ref).expanduser(), Path("outputs") / ref]
    for place in places:
        if (place / "job.json").is_file():
            return RunFolder(place.absolute())
    known = sorted(path.parent.name for path in Path("outputs").glob("*/job.json"))
    raise JobError(
        f"no run {ref}",
        at=ref,
        why=f"neither {places[0]} nor {places[1]} has a job.json",
        try_=f"one of {', '.join(known[:8])}" if known else "give the path of a run folder",
    )


def find_checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The complete checkpoint of `step`, or the newest.

    Raises:
        JobError: no complete checkpoint, or none of that step.
    """
    complete = folder.complete_checkpoints()
    wanted = [path for path in complete if step is None or path.name == f"step_{step}"]
    if wanted:
        return wanted[-1]
    names = ", ".join(path.name.removeprefix("step_") for path in complete)
    raise JobError(
        "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}",
        at=str(folder.checkpoints),
        why=f"complete are the steps {names}" if names else "none has a manifest",
        try_=f"--step {names.split(', ')[-1]}" if names else "train on with `farspan run JOB --resume`",
    )
