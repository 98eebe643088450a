"""Sentences of different lengths."""

SENTENCES = [
    "a stirring , funny and finally transporting film",
    "the plot is thin and the jokes are thinner",
    "an honest , sensitive story from a first-time director",
    "it never rises above its clichés",
    "good",
    "this is a long sentence that goes on for quite a while so that the padding of the others is real padding",
]
