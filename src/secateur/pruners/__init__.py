"""Networks that score heads, and what they look at."""
