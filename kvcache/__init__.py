"""Pages of the KV cache: what they hold, who owns them, how sequences find them."""
