"""Number types as `source/nested.cuh` numbers them."""

import torch

VALUES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Of activations and results."""
PARTS = {torch.float32: 0, torch.float16: 1}
"""Of scales and zeros."""
