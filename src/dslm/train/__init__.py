"""Continuing the training of a model: on text or conversations, with adapters, from a teacher."""
