"""The report of `anybit eval` as tables."""

from typing import Any

from rich.markup import escape
from rich.table import Table


def text_table(report: dict[str, Any]) -> Table:
    title = escape(f"{report['model']} on {report['text']}: {report['tokens']} tokens, context {report['context']}")
    table = Table(
        "bits", "scheme", "KV", "effective bits", "perplexity", "KL (nats)", "top-1 agreement", "seconds", title=title
    )
    for row in report["results"]:
        table.add_row(
            _bits(row),
            row["scheme"],
            row["kv_format"] or "",
            _optional(row["effective_bits"], ".2f"),
            f"{row['perplexity']:,.3f}",
            _optional(row["kl"], ".4f"),
            _optional(row["top1_agreement"], ".3f"),
            f"{row['seconds']:.1f}",
        )
    return table


def task_tables(report: dict[str, Any]) -> list[Table]:
    """One table per task: accuracies with their standard errors."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in report["tasks"]:
        by_task.setdefault(row["task"], []).append(row)
    return [_task_table(report["model"], task, rows) for task, rows in by_task.items()]


def _task_table(model: str, task: str, rows: list[dict[str, Any]]) -> Table:
    title = escape(f"{model} on {task}: {rows[0]['questions']} questions")
    table = Table("bits", "scheme", "accuracy", "accuracy per byte", title=title)
    for row in rows:
        accuracies = [_percent(row[name], row[f"{name}_stderr"]) for name in ("accuracy", "acc_norm")]
        table.add_row(_bits(row), row["scheme"], *accuracies)
    return table


def _bits(row: dict[str, Any]) -> str:
    return "default" if row["bit_width"] is None else str(row["bit_width"])


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(share: float, error: float | None) -> str:
    return f"{100 * share:.1f} %" if error is None else f"{100 * share:.1f} ± {100 * error:.1f} %"
