"""Predictions, not measurements, of training steps on many GPUs: what docs/scaling.md shows."""
