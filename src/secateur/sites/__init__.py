"""What holds units: attention blocks, what each head owns there, reading and gating it, and the recipe as data."""
