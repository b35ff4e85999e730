"""What an exported adapter's README says of the base it belongs to."""

from __future__ import annotations

PREPARED = """
It belongs to rounded weights, which `prepared_base` holds; on the pretrained ones it is wrong.
`farspan.trainer.bases.prepared.store.open_dequantized("prepared_base")` opens them for `PeftModel.from_pretrained`;
`farspan export --whole-base` writes them as a plain model, `--merged` with the adapter folded in.
"""


def readme(base: str, *, is_hub_id: bool, prepared: bool) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        base: hub id, or a folder.
        prepared: the adapter's base was rounded before training.
    """
    is_hub_id = is_hub_id and not prepared
    front = f"base_model: {base}\n" if is_hub_id else ""
    where = (
        f"The base model is `{base}` on the hub."
        if is_hub_id
        else f"The base model is a local folder, written in `adapter_config.json` as an absolute path:\n`{base}`.\n"
        "If it moves, load the base yourself and give it to `PeftModel.from_pretrained(base, this_folder)`,\n"
        "or change `base_model_name_or_path`."
    )
    return f"---\n{front}library_name: peft\n---\n\n# LoRA adapter\n\nTrained with Farspan. {where}\n" + (
        PREPARED if prepared else ""
    )
