"""Training and evaluation of the reference multimodal transformer."""
