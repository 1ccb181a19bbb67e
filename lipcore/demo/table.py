"""The table that the demo prints, and the two sentences below it."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from lipcore.demo import summary
from lipcore.demo.runs import TaskResult
from lipcore.demo.tasks import HOW_CHOSEN

WHAT_TO_SEE = (
    "What to see: all training losses fall (left), but the harder the task, the longer the normalised length per epoch "
    "becomes (middle), with larger local Lipschitz constants and a larger test loss (right); early in training the "
    "order can be reversed, because length measures what has been learnt so far. The number of epochs until all have "
    "the same training loss orders the tasks as well; what beat length where is in docs/evidence.md."
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
        found = summary.rank_correlations(result)
        told = ", ".join(f"{name} {rho:.2f}" for name, rho in found.items() if not math.isnan(rho))
        console.print(f"Rank correlation with the test loss over the {len(result.runs)} runs: {told or 'none'}")
    console.print()
    console.print(WHAT_TO_SEE_QUICK if quick else WHAT_TO_SEE)
    console.print(f"How the setting was chosen: {HOW_CHOSEN}")


def _table(result: TaskResult) -> Table:
    task = result.task
    over = f"means over {task.seeds} seeds" if task.seeds > 1 else "one seed"
    title = f"{task.title} (numbers of the {task.output}; {over})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    loss = _short(summary.equal_loss(result))
    for heading in (  # narrow ones: a terminal has 80 columns
        *(task.difficulty.replace(" ", "\n"), "cumulative\nlength per\nsample", f"epochs to\na loss\nof {loss}"),
        *("gradient\nnorm", "local\nLipschitz\nmean", "\n\np99", "test\nloss"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary.rows(result):
        spread = "" if math.isnan(row.cumulative_length_sd) else f" ± {_short(row.cumulative_length_sd)}"
        table.add_row(
            f"{row.level:g}",
            f"{_short(row.cumulative_length)}{spread}",
            f"{row.epochs_to_equal_loss:.3g}",
            _short(row.grad_norm),
            _short(row.lipschitz_mean),
            _short(row.lipschitz_p99),
            _short(row.test_loss),
        )
    return table


def _short(number: float) -> str:
    """Return a number with three digits, without exponents for the sizes that occur."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:#.3g}" if abs(number) >= 1e-3 else f"{number:.2g}"
