"""What each bit-width costs and what it gives."""

from panels import Dashboard, Panel, Query, Row
from promql import MODEL, by_width, mean, quantile, rate, recorded

DASHBOARD = Dashboard(
    "anybit-bit-widths",
    "AnyBit: bit-widths side by side",
    "What each bit-width costs and what it gives: latency, throughput, memory, bytes read per token, quality.",
    [
        Row(
            "Side by side, last 5 minutes",
            [
                Panel(
                    "Between two tokens, p50", recorded("model_bit_width:anybit_inter_token_latency_seconds:p50_5m"),
                    "s", "bargauge",
                ),
                Panel(
                    "Time to first token, p95", recorded("model_bit_width:anybit_time_to_first_token_seconds:p95_5m"),
                    "s", "bargauge",
                ),
                Panel(
                    "Tokens a second of one stream", recorded("model_bit_width:anybit_tokens_per_stream_second:mean5m"),
                    "short", "bargauge", "While it is being answered.",
                ),
                Panel(
                    "Weight bytes read per token",
                    recorded("model_bit_width:anybit_weight_bytes_read_per_token:ratio5m"),
                    "bytes", "bargauge",
                    "Of all steps, prompts included. Requests computed together share what a step reads.",
                ),
                Panel(
                    "If each width were a model of its own",
                    [
                        *by_width(f"max by (bit_width) (anybit_weights_equivalent_bytes{{{MODEL}}})"),
                        Query(f"max(sum by (instance) (anybit_weights_bytes{{{MODEL}}}))", "all widths, as served"),
                    ],
                    "bytes", "bargauge", "Weights in memory.",
                ),
                Panel(
                    "KL divergence from the highest width, nats a token",
                    recorded("model_bit_width:anybit_shadow_kl_nats_per_token:ratio1h"),
                    "none", "bargauge",
                    "A lower bound, over answers that were scored again in the last hour (--shadow-rate).",
                ),
            ],
        ),
        Row(
            "Latency",
            [
                Panel(
                    "Between two tokens, p95",
                    by_width(quantile(0.95, "anybit_inter_token_latency_seconds", "bit_width")), "s",
                ),
                Panel(
                    "Time to first token, p95",
                    by_width(quantile(0.95, "anybit_time_to_first_token_seconds", "bit_width")), "s",
                ),
                Panel(
                    "Whole requests, p95",
                    by_width(quantile(0.95, "anybit_request_duration_seconds", "bit_width")), "s",
                ),
                Panel("Queue, mean", by_width(mean("anybit_request_queue_seconds", "bit_width")), "s"),
                Panel("Prefill, mean", by_width(mean("anybit_request_prefill_seconds", "bit_width")), "s"),
                Panel("Decode, mean", by_width(mean("anybit_request_decode_seconds", "bit_width")), "s"),
            ],
        ),
        Row(
            "Throughput and traffic",
            [
                Panel(
                    "Tokens a second", by_width(rate("anybit_generated_tokens_total", "bit_width")), stacked=True
                ),
                Panel("Requests a second", by_width(rate("anybit_requests_total", "bit_width")), "reqps", stacked=True),
                Panel(
                    "Requests running", by_width(f"sum by (bit_width) (anybit_requests_running{{{MODEL}}})"),
                    stacked=True,
                ),
                Panel(
                    "Weight bytes read a second", by_width(rate("anybit_weight_bytes_read_total", "bit_width")), "Bps",
                    stacked=True,
                ),
                Panel(
                    "Weight bytes read per token",
                    recorded("model_bit_width:anybit_weight_bytes_read_per_token:ratio5m"), "bytes",
                ),
                Panel(
                    "Bits", [Query(f"max by (bit_width, effective_bits, effective_bits_with_head, method) "
                                   f"(anybit_model_info{{{MODEL}}})")],
                    kind="table", description="Effective bits count the scales and zeros that a width reads.",
                ),
            ],
        ),
        Row(
            "Quality",
            [
                Panel(
                    "KL divergence from the highest width, nats a token",
                    recorded("model_bit_width:anybit_shadow_kl_nats_per_token:ratio1h"), "none",
                    description="A lower bound, over answers that were scored again (--shadow-rate).",
                ),
                Panel(
                    "Likeliest token is that of the highest width",
                    recorded("model_bit_width:anybit_shadow_top1_agreement:ratio1h"), "percentunit", maximum=1,
                ),
                Panel(
                    "Answers scored again",
                    [Query(rate("anybit_shadow_requests_total", "bit_width, outcome"), "{{bit_width}} bits, {{outcome}}")],
                    "reqps",
                ),
            ],
        ),
    ],
)  # fmt: skip
