"""How an engine sets its KV cache up for a model, and what a step does in sealed pages; pages are anybit.kvcache's."""
