"""A host's log, read while it is written: numbers, whole lines, and a live line on the screen."""

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

Metrics = dict[str, float]


class _Number(ast.NodeVisitor):
    def visit_Constant(self, node: ast.Constant) -> float:
        return float(node.value)

    def visit_Name(self, node: ast.Name) -> float:
        return float(node.id)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> float:
        return -self.visit(node.operand)

    def visit_Call(self, node: ast.Call) -> float:
        return self.visit(node.args[0])

    def generic_visit(self, node: ast.AST) -> float:
        raise ValueError(f"not a number: {ast.unparse(node)}")


def number(printed: str | ast.expr) -> float | None:
    """A number as a Python log prints it: 1, -1.5, nan, -inf, tensor(0.5), np.float64(2.0).

    Returns:
        None for anything else.
    """
    try:
        node = ast.parse(printed.strip(), mode="eval").body if isinstance(printed, str) else printed
        return _Number().visit(node)
    except (SyntaxError, ValueError, TypeError, IndexError):
        return None


class LogTail:
    """The lines of a growing file, each once and only when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.torn = b""

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            file.seek(self.position)
            chunk = file.read()
        self.position += len(chunk)
        *lines, self.torn = (self.torn + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def json_line(metrics: Metrics) -> str:
    """A line of metrics.jsonl; JSON has no nan and no inf: null stands for them."""
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return json.dumps(finite) + "\n"


class StepLine:
    """The live line of a run: a bar, step, reward, KL and seconds left.

    Off a terminal, where nothing can be redrawn, each step is a line of its own.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self.started: float | None = None
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=None, phase="", status="")

    def __enter__(self) -> "StepLine":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def phase(self, text: str) -> None:
        """Something long begins of which no steps can be counted."""
        self.progress.update(self.task, phase=text, total=None, status="")
        if not self.console.is_terminal:
            self.console.print(text, highlight=False)

    def step(self, metrics: Metrics) -> None:
        now = monotonic()
        done = int(metrics["step"])
        status = f"step {done}/{self.steps}  {headline(metrics)}"
        # The first step holds warm-ups, so the pace is taken from the second on.
        if self.started is None:
            self.started, self.first = now, done
        elif done > self.first:
            pace = (now - self.started) / (done - self.first)
            status += f"  {math.ceil(pace * (self.steps - done))} s left"
        self.progress.update(
            self.task, phase="training", total=self.steps, completed=done, status=status
        )
        if not self.console.is_terminal:
            self.console.print(status, highlight=False)


def headline(metrics: Metrics) -> str:
    """Reward and KL of a step, as far as they are measured."""
    measured = {"reward": f"{metrics.get('reward', math.nan):.3f}", "KL": f"{kl(metrics):.4f}"}
    return "  ".join(f"{name} {value}" for name, value in measured.items() if value != "nan")


def kl(metrics: Metrics) -> float:
    """The sampled tokens' mean KL estimate, nats per token: klplug's unbiased k3, else the host's.

    OpenRLHF logs under `kl` the value of whatever estimator was chosen, k2's as well, and 0 where
    there is no reference to measure from: nan here.
    """
    if metrics.get("klplug/kl_coef") == 0:
        return math.nan
    return metrics.get("klplug/k3", metrics.get("kl", math.nan))
