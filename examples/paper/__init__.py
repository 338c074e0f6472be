"""The evaluation of the paper, from pretrained weights to its tables and figures: `python -m examples.paper`."""
