"""Requests, scheduling, model execution, sampling, weights; offline quantization beside the serving path."""
