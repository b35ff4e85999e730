"""Problems with verifiable answers that a machine can make without end, and prompts of one's own."""

from typing import Annotated

from pydantic import Field

from farspan.trainer.rl.tasks.arithmetic import Arithmetic
from farspan.trainer.rl.tasks.base import Demonstration, Problem, Step, Task, Verdict
from farspan.trainer.rl.tasks.countdown import Countdown
from farspan.trainer.rl.tasks.maze import Maze
from farspan.trainer.rl.tasks.prompts import Prompts
from farspan.trainer.rl.tasks.sorting import Sorting

TaskSource = Annotated[Arithmetic | Countdown | Maze | Sorting | Prompts, Field(discriminator="type")]

__all__ = [
    "Arithmetic",
    "Countdown",
    "Demonstration",
    "Maze",
    "Problem",
    "Prompts",
    "Sorting",
    "Step",
    "Task",
    "TaskSource",
    "Verdict",
]
