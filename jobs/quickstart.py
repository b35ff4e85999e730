"""`make quickstart`: train the job of `stdlib_llama.py`, open what it made with transformers, let it write a little.

Everything it does a user can do with `farspan run` and `farspan export`; it adds the comparison with the unigram
entropy, which is the loss of a model that knows how often each token occurs and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from farspan.errors import FarspanError, RunFailed
from farspan.jobs.run import RunResult, run
from farspan.jobs.stdlib_llama import job
from farspan.trainer.run_folder import RunFolder

PROMPT = "def __init__(self, "


def main() -> int:
    """Train, export, reload, write; the exit code of the command line."""
    console = Console()
    try:
        result = run(job, clean=True, console=console)
        check_learned(result, console)
        assert result.checkpoint is not None
        show_sample(result.checkpoint / "export", console)
    except FarspanError as error:
        console.print(str(error), highlight=False, markup=False)
        return error.exit_code
    console.print(f"report   {RunFolder(result.run_dir).report}", highlight=False, soft_wrap=True)
    return 0


def check_learned(result: RunResult, console: Console) -> None:
    """Print held-out loss beside the unigram entropy of the training tokens, in nats per token.

    Raises:
        RunFailed: the model is not well under it, so training did not work.
    """
    from farspan.trainer.config import TrainSpec
    from farspan.trainer.data.store import TokenStore

    spec = TrainSpec.model_validate_json((result.run_dir / "train_spec.json").read_text(encoding="utf-8"))
    entropy = float(TokenStore(Path(spec.tokens_dir)).meta["unigram_entropy_nats"])
    held_out = float(result.metrics["eval_loss"])
    console.print(f"learned  held-out loss {held_out:.3f}, unigram entropy of the data {entropy:.3f} (nats per token)")
    if held_out > entropy - 0.5:
        raise RunFailed(
            f"held-out loss {held_out:.3f} is not well under the unigram entropy {entropy:.3f}",
            at=str(RunFolder(result.run_dir).metrics),
            why="a model that reads its context should be at least 0.5 nats better than token frequencies",
            try_="look at the loss in report.html; train longer with more optim.steps",
        )


def show_sample(export: Path, console: Console) -> None:
    """Reload the exported model as any transformers user would, and let it go on from a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.8, top_k=50)
    console.print(f"exported {export} (reloaded with transformers)", highlight=False, soft_wrap=True)
    console.print("sample   " + tokenizer.decode(tokens[0]).replace("\n", "\n         "), highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
