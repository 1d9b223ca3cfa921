"""Checkpoints: a lazy reader, and a streaming writer."""
