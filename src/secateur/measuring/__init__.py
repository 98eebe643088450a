"""What a model costs: counted, timed in turn, and what each of its units adds."""
