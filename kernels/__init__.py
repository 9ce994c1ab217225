"""Pure tensor functions: bit layouts, the oracle, and the implementations that execute them."""
