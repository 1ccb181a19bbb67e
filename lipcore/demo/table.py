"""The table that the demo prints, and the two sentences below it."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from lipcore.demo import summary
from lipcore.demo.runs import TaskResult
from lipcore.demo.tasks import HOW_CHOSEN

WHAT_TO_SEE = (
    "What to see: all training losses fall (left), but the harder the task, the longer the normalised length per epoch "
    "becomes (middle), with larger local Lipschitz constants and a larger test loss (right); early in training the "
    "order can be reversed, because length measures what has been learnt so far."
)
WHAT_TO_SEE_QUICK = (
    "What to see: that everything works; --quick stops long before the networks fit their task, so expect no order."
)


def show(results: list[TaskResult], *, quick: bool) -> None:
    """Print both tables and the sentences."""
    console = Console(highlight=False)
    for result in results:
        console.print()
        console.print(_table(result))
        order = summary.order(result)
        levels = [f"{level:g}" for level in result.task.levels]
        console.print(
            f"Seeds in order: {levels[0]} < {levels[-1]} in {order.lowest_below_highest} of {order.seeds}, "
            f"{' < '.join(levels)} in {order.all_levels} of {order.seeds}"
        )
    console.print()
    console.print(WHAT_TO_SEE_QUICK if quick else WHAT_TO_SEE)
    console.print(f"How the setting was chosen: {HOW_CHOSEN}")


def _table(result: TaskResult) -> Table:
    task = result.task
    table = Table(title=f"{task.title} (numbers of the {task.output})", title_justify="left")
    table.add_column(task.difficulty, justify="right")
    table.add_column("cumulative length\nper sample", justify="right")
    table.add_column("local Lipschitz\nmean", justify="right")
    table.add_column("\np99", justify="right")
    table.add_column("test\nloss", justify="right")
    table.add_column("seeds", justify="right")
    for row in summary.rows(result):
        spread = "" if math.isnan(row.cumulative_length_sd) else f" ± {_short(row.cumulative_length_sd)}"
        table.add_row(
            f"{row.level:g}",
            f"{_short(row.cumulative_length)}{spread}",
            _short(row.lipschitz_mean),
            _short(row.lipschitz_p99),
            _short(row.test_loss),
            str(row.seeds),
        )
    return table


def _short(number: float) -> str:
    """Return a number with three digits, without exponents for the sizes that occur."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:#.3g}" if abs(number) >= 1e-3 else f"{number:.2g}"
