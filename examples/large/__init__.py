"""A Llama, random or from a checkpoint, sharded over eight devices and packed in place: `python -m examples.large`."""
