"""The layers: a variance, a stream, and a plain layer on a noised input."""
