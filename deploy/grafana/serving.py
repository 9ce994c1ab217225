"""Load, latency and health."""

from panels import Dashboard, Panel, Query, Row
from promql import MODEL, mean, quantiles, rate

DASHBOARD = Dashboard(
    "anybit-serving",
    "AnyBit: serving",
    "Load, latency and health of the servers of a model.",
    [
        Row(
            "Now",
            [
                Panel("Servers ready", [Query(f"sum(anybit_ready{{{MODEL}}})")], kind="stat", width=4, height=4),
                Panel(
                    "Requests a second", [Query(rate("anybit_requests_total", ""))], "reqps", "stat", width=5, height=4
                ),
                Panel(
                    "Tokens a second", [Query(rate("anybit_generated_tokens_total", ""))], "short", "stat",
                    width=5, height=4,
                ),
                Panel(
                    "Requests that failed",
                    [Query(f"max(model:anybit_request_errors:ratio5m{{{MODEL}}} or 0 * anybit_ready{{{MODEL}}})")],
                    "percentunit", "stat", "Share of those that ended in the last 5 minutes.", width=5, height=4,
                ),
                Panel(
                    "Seconds since the last step",
                    [Query(f"max(time() - anybit_engine_last_step_timestamp_seconds{{{MODEL}}})")],
                    "s", "stat", "Of the engine that has been still for longest; an idle one takes no steps.",
                    width=5, height=4,
                ),
            ],
        ),
        Row(
            "Latency",
            [
                Panel("Time to first token", quantiles("anybit_time_to_first_token_seconds"), "s"),
                Panel("Between two tokens", quantiles("anybit_inter_token_latency_seconds"), "s"),
                Panel("Whole requests", quantiles("anybit_request_duration_seconds"), "s"),
                Panel(
                    "Where a request's time goes",
                    [
                        Query(mean(f"anybit_request_{phase}_seconds"), phase)
                        for phase in ("queue", "prefill", "decode")
                    ],
                    "s", description="Means.", stacked=True,
                ),
                Panel("Tokens of a step", quantiles("anybit_step_tokens", (0.5, 0.95))),
                Panel(
                    "Slow paths taken",
                    [Query(rate("anybit_kernel_fallbacks_total", "kernel, reason"), "{{kernel}}: {{reason}}")],
                    "cps", description="Calls a second that ran on something slower than the kernel made for them.",
                    no_value="none",
                ),
            ],
        ),
        Row(
            "Load",
            [
                Panel(
                    "Requests in the engine",
                    [
                        Query(f"sum(anybit_requests_{state}{{{MODEL}}})", state)
                        for state in ("running", "waiting")
                    ],
                    stacked=True,
                ),
                Panel(
                    "Tokens a second",
                    [
                        Query(rate("anybit_generated_tokens_total", ""), "generated"),
                        Query(rate("anybit_prompt_tokens_total", ""), "prompts"),
                    ],
                ),
                Panel(
                    "How requests end", [Query(rate("anybit_requests_total", "outcome"), "{{outcome}}")], "reqps",
                    stacked=True,
                ),
                Panel("Requests refused", [Query(rate("anybit_rejections_total", "reason"), "{{reason}}")], "reqps"),
                Panel(
                    "Memory of the device",
                    [Query(f"sum by (kind) (anybit_device_memory_bytes{{{MODEL}}})", "{{kind}}")], "bytes",
                    stacked=True,
                ),
                Panel(
                    "Resident memory",
                    [
                        Query(f"sum(anybit_engine_resident_bytes{{{MODEL}}})", "engine"),
                        Query(
                            f"sum(process_resident_memory_bytes * on (instance) anybit_ready{{{MODEL}}} ^ 0)",
                            "server",
                        ),
                    ],
                    "bytes",
                ),
            ],
        ),
    ],
)  # fmt: skip
