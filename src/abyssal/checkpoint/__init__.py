"""Weights on disk: Hugging Face folders in and out, in BF16, FP32 and block-scaled FP8."""
