"""The only rooms that know the internals of transformers."""
