"""Between texts of a task and token ids of a policy: its own tokenizer, and its chat template where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from farspan.errors import DataError
from farspan.jobs.config import RLJob
from farspan.trainer.config import Model
from farspan.trainer.rl.tasks.base import Problem

KEPT_PROMPTS = 1 << 16
SHOWN_PROBLEMS = 256
"""Problems whose prompts are measured before anything starts."""


class PolicyTokens:
    """Encodes prompts and decodes responses."""

    def __init__(self, model: Model) -> None:
        from farspan.trainer.data.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(str(Path(model.tokenizer or model.id)))
        self.chat = self.tokenizer.chat_template is not None
        self.vocab = len(self.tokenizer)
        self.eos_ids = (int(self.tokenizer.eos_token_id),)
        self._of: dict[str, list[int]] = {}

    def encode(self, problem: Problem) -> Sequence[int]:
        if problem.prompt not in self._of:
            if len(self._of) >= KEPT_PROMPTS:
                self._of.clear()
            if self.chat:
                turns = [{"role": "user", "content": problem.prompt}]
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                self._of[problem.prompt] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            else:
                self._of[problem.prompt] = self.tokenizer(problem.prompt)["input_ids"]
        return self._of[problem.prompt]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def check(self, job: RLJob) -> None:
        """Prompts with the longest response must fit into a pack."""
        lengths = [len(self.encode(job.task.problem(number))) for number in range(SHOWN_PROBLEMS)]
        needed = max(lengths) + job.rollout.cap
        if needed > job.context:
            raise DataError(
                "a prompt with its response does not fit into a pack",
                at=f"context = {job.context}",
                why=f"the longest of {SHOWN_PROBLEMS} prompts has {max(lengths)} tokens, a response up to "
                f"{job.rollout.cap}: {needed} in all",
                try_=f"--set context={needed}, or a smaller rollout.cap",
            )
