"""The reference multimodal transformer: text, images and sound, in and out."""
