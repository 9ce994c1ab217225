"""How full the KV cache is, and what its formats cost."""

from panels import Dashboard, Panel, Query, Row
from promql import MODEL, rate

DASHBOARD = Dashboard(
    "anybit-kv-cache",
    "AnyBit: KV cache",
    "Keys and values: how full, how large in each format, how often found again.",
    [
        Row(
            "Memory",
            [
                Panel(
                    "Pages in use",
                    [Query(f"max by (kv_format) (anybit_kv_cache_usage_ratio{{{MODEL}}})", "{{kv_format}}")],
                    "percentunit", maximum=1, description="Of the fullest server.",
                ),
                Panel(
                    "Bytes by state",
                    [Query(f"sum by (kv_format, state) (anybit_kv_cache_bytes{{{MODEL}}})", "{{kv_format}}, {{state}}")],
                    "bytes", stacked=True,
                ),
                Panel(
                    "Preemptions a second", [Query(rate("anybit_preemptions_total", ""), "preemptions")], "cps",
                    description="Sequences that gave their pages to older ones and are computed again.",
                ),
            ],
        ),
        Row(
            "Formats",
            [
                Panel(
                    "Bytes per token",
                    [Query(f"max by (kv_format) (anybit_kv_bytes_per_token{{{MODEL}}})", "{{kv_format}}")],
                    "bytes", "bargauge",
                ),
                Panel(
                    "Tokens that fit",
                    [Query(f"sum by (kv_format) (anybit_kv_capacity_tokens{{{MODEL}}})", "{{kv_format}}")],
                    "short", "bargauge",
                ),
                Panel(
                    "Layers raised to 8 bits",
                    [Query(f"max by (kv_format) (anybit_kv_layers_raised{{{MODEL}}})", "{{kv_format}}")],
                    "short", "bargauge", "By the check at the start of a server.",
                ),
                Panel(
                    "Pages encoded a second",
                    [Query(rate("anybit_kv_sealed_pages_total", "kv_format"), "{{kv_format}}")], "cps",
                ),
                Panel(
                    "Time to encode a page",
                    [
                        Query(
                            f"{rate('anybit_kv_seal_seconds_total', 'kv_format')}"
                            f" / ({rate('anybit_kv_sealed_pages_total', 'kv_format')} > 0)",
                            "{{kv_format}}",
                        )
                    ],
                    "s", description="All layers of 64 tokens.",
                ),
            ],
        ),
        Row(
            "Prompts that begin alike",
            [
                Panel(
                    "Prompt tokens found", [Query(f"max(model:anybit_prefix_cache_hit:ratio5m{{{MODEL}}})", "found")],
                    "percentunit", maximum=1, description="Share of those looked up in the last 5 minutes.", width=12,
                ),
                Panel(
                    "Prompt tokens a second",
                    [
                        Query(rate("anybit_prefix_cache_queried_tokens_total", ""), "looked up"),
                        Query(rate("anybit_prefix_cache_hit_tokens_total", ""), "found"),
                    ],
                    width=12,
                ),
            ],
        ),
    ],
)  # fmt: skip
