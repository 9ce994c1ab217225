"""Markdown tables of what formats of keys and values cost, from the reports under results/.

python tests/bench/kv_tables.py divergence|errors|published|balance|codebooks
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = {"smollm2": "SmolLM2-135M", "qwen25": "Qwen2.5-0.5B"}


def main() -> None:
    tables = {
        "divergence": divergence,
        "errors": errors,
        "published": published,
        "balance": balance,
        "codebooks": codebooks,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables)
    print("\n".join(tables[parser.parse_args().table]()))


def divergence() -> Iterator[str]:
    """KL and top-1 agreement by format and model, from `anybit bench kv` and kv_divergence.py; nearest formats first."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for model in MODELS:
        for report in (f"kv_{model}_cpu", f"kv_divergence_{model}_cpu"):
            for row in read(report)["rows"]:
                rows.setdefault(row["kv_format"], {}).setdefault(model, row)
    del rows["bf16"]
    yield from header(
        "format",
        "bits of keys / values",
        *(f"{name}: {what}" for name in MODELS.values() for what in ("KL", "same token")),
    )
    for name, of_model in sorted(rows.items(), key=lambda item: max(row["kl"] for row in item[1].values())):
        bits = next(iter(of_model.values()))
        cells = [name, f"{bits['key_bits']:.2f} / {bits['value_bits']:.2f}"]
        for model in MODELS:
            found = of_model.get(model)
            cells += ["–", "–"] if found is None else [f"{found['kl']:.4f}", f"{100 * found['top1_agreement']:.1f} %"]
        yield line(*cells)


def errors() -> Iterator[str]:
    """Errors of keys, values, logits and attention's output, of kv_formats.py; formats with the least of the last first."""
    measured = {title: report["formats"] for title, report in reports("kv_formats").items()}
    yield from header(
        "format",
        "bits of keys / values",
        *(f"{title}: {what}" for title in measured for what in ("keys", "values", "logits", "output")),
    )
    first = next(iter(measured.values()))
    for name in sorted(first, key=lambda name: first[name]["output"]):
        bits = first[name]
        yield line(
            name,
            f"{bits['key_bits']:.2f} / {bits['value_bits']:.2f}",
            *(
                number(report[name][column])
                for report in measured.values()
                for column in ("k", "v", "logits", "output")
            ),
        )


def published() -> Iterator[str]:
    """QET's share of product quantization's error, and what pages lose in as many bits, of kv_published_qet.py: means over
    the swept layers."""
    measured = {title: by_place(report["sweep"]) for title, report in reports("kv_published_qet").items()}
    columns = ("product quantization", "QET as published", "share", "pages")
    yield from header("of", "bits", "groups", *(f"{title}: {column}" for title in measured for column in columns))
    for place in next(iter(measured.values())):
        of, bits, groups = place
        cells = [of, f"{bits:.2f}", str(groups)]
        for rows in (places[place] for places in measured.values()):
            pq, qet = mean(row.get("pq") for row in rows), mean(row.get("qet") for row in rows)
            pages = min(mean(row[name] for row in rows) for name in ("uniform", "rotation + Lloyd-Max"))
            share = "–" if pq is None or qet is None else f"{100 * qet / pq:.0f} %"
            cells += [number(pq), number(qet), share, number(pages)]
        yield line(*cells)


def by_place(sweep: list[dict[str, Any]]) -> dict[tuple[str, float, int], list[dict[str, Any]]]:
    """Layers' rows of the same kind, budget and groups."""
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for row in sweep:
        found.setdefault((row["of"], row["budget"], row["groups"]), []).append(row)
    return found


def balance() -> Iterator[str]:
    """KL and top-1 agreement by where keys' balance weights come from, of kv_balance.py."""
    yield from header("model", "format", "keys balanced by", "layers in uniform8", "KL", "same token")
    for title, report in reports("kv_balance").items():
        for row in report["rows"]:
            raised = ", ".join(map(str, row["raised"])) or "–"
            agreement = f"{100 * row['top1_agreement']:.1f} %"
            yield line(title, row["kv_format"], row["balance"], raised, f"{row['kl']:.4f}", agreement)


def codebooks() -> Iterator[str]:
    """Errors, KL and top-1 agreement by what codebooks are trained on, of kv_codebooks.py; changes are from the universal
    ones, of KL in each window too."""
    changes = ("Δ keys", "Δ values", "Δ output", "Δ KL", "Δ KL by window")
    yield from header("model", "format", "codebooks", "calibration", "KL", "same token", *changes)
    for title, report in reports("kv_codebooks").items():
        universal = {row["kv_format"]: row for row in report["rows"] if row["codebooks"] == "universal"}
        for row in report["rows"]:
            base = universal[row["kv_format"]]
            calibration = "–" if row["calibration"] is None else str(row["calibration"] + 1)
            cells = [title, row["kv_format"], row["codebooks"], calibration]
            cells += [f"{fmean(row['kl']):.5f}", f"{100 * fmean(row['top1_agreement']):.1f} %"]
            if row is base:
                cells += ["–"] * len(changes)
            else:
                cells += [percent(row[column] / base[column]) for column in ("k", "v", "output")]
                cells.append(percent(fmean(row["kl"]) / fmean(base["kl"])))
                by_window = zip(row["kl"], base["kl"], strict=True)
                cells.append(", ".join(percent(found / wanted, 0) for found, wanted in by_window))
            yield line(*cells)


def percent(ratio: float, digits: int = 1) -> str:
    """By how much more or less than 1."""
    return f"{100 * (ratio - 1):+.{digits}f} %".replace("-", "−")


def reports(kind: str) -> dict[str, dict[str, Any]]:
    """Those that there are, by the model's name."""
    return {
        title: read(f"{kind}_{model}_cpu")
        for model, title in MODELS.items()
        if (RESULTS / f"{kind}_{model}_cpu.json").is_file()
    }


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def header(*cells: str) -> Iterator[str]:
    yield line(*cells)
    yield line(*("---" for _ in cells))


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:#.2g}".rstrip(".")


def mean(values: Iterator[float | None]) -> float | None:
    """None where one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


if __name__ == "__main__":
    main()
