"""The numbers that tell of a head, by name: the columns of `Evidence.features`.

size: log of the mean norm of the contribution (the `contribution` scorer), less its mean over the site; variation: the
same of how far a text's mean contribution is from the mean over texts; relevance: log of the covariance (unbiased HSIC)
between a head's contributions to texts and their representations, less the site's mean. "of the first token": the
contribution at the first token instead of the mean over tokens. alignment: unbiased linear CKA of the two. cosine
with site, share of site: of the head's contribution with and in the sum over its site's heads. unexplained: log of the
share of a head's contribution that is no linear combination of the other heads', over tokens or between texts;
nearest head: the largest cosine with another head. entropy is divided by its largest value. site level: the site's
mean of log sizes; site size, site variation: log of the norm of the sum over the site's heads; these three less their
mean over sites. depth: 0 first site, 1 last; height: 1 / sites; heads: of the site, / 16.
"""

from __future__ import annotations

MAP_FEATURES = ("entropy", "confidence", "to first", "to last", "to self", "to previous", "to next")
SIZE_FEATURES = ("size", "variation", "variation of the first token", "relevance", "relevance of the first token")
DIRECTION_FEATURES = ("alignment", "alignment of the first token", "cosine with site", "share of site")
REDUNDANCY_FEATURES = ("unexplained", "unexplained between texts", "nearest head")
LEVEL_FEATURES = ("site level", "site size", "site variation")
PLACE_FEATURES = ("depth", "height", "heads", "is pair")

FEATURES = SIZE_FEATURES + DIRECTION_FEATURES + REDUNDANCY_FEATURES + MAP_FEATURES + LEVEL_FEATURES + PLACE_FEATURES

SIZE, LEVEL = FEATURES.index("size"), FEATURES.index("site level")
DEPTH, IS_PAIR = FEATURES.index("depth"), FEATURES.index("is pair")

EVIDENCE_KINDS = {
    "sizes": SIZE_FEATURES + LEVEL_FEATURES,
    "direction": DIRECTION_FEATURES,
    "redundancy": REDUNDANCY_FEATURES,
    "maps": MAP_FEATURES,
    "place": PLACE_FEATURES,
}
"""Kinds of evidence that a pruner can be made without, for ablations; `prior` looks at a size in any case."""
