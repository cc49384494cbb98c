"""Three conversations with the reference model."""
