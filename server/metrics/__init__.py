"""Everything that /metrics shows; the only package that knows Prometheus."""
