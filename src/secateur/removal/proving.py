"""The proof of a removal: what the gated model says, and what the cut one says, run until it does or cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from secateur.errors import RemovalError
from secateur.models.failure import place_of, running_modules, site_of
from secateur.removal.emptied import bypass_
from secateur.removal.left import Left
from secateur.removal.proof import FAILURES, Wanted
from secateur.removal.reshaped import reshape_
from secateur.sites.layout import AttentionSite
from secateur.sites.narrowing import Undo


@dataclass(frozen=True)
class Special:
    """Sites that do not run as they are once heads are gone, by what is done about it."""

    bypassed: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)


def difference_to(wanted: Sequence[Wanted], base: PreTrainedModel) -> float:
    """Return how far what the model says is from what is wanted."""
    return max(one.difference(base) for one in wanted)


def prove(base: PreTrainedModel, wanted: Sequence[Wanted], left: Left, undo: Undo) -> tuple[float, Special]:
    """Return the difference of the cut model to the gated one, and the sites that do not run as they are.

    A model that raises is run again: with the code of emptied sites left out, or with the widths corrected that the
    code of the site which was running asks for.
    """
    sites = {name: site for name, site in left.sites.items() if isinstance(site, AttentionSite)}
    kept = left.kept
    emptied = [site for name, site in sites.items() if not kept[name].any()]
    special = Special()
    while True:
        try:
            with running_modules(base) as running:
                return difference_to(wanted, base), special
        except FAILURES as error:
            site = sites.get(site_of(running, sites) or "")
            can_reshape = site is not None and 0 < int(kept[site.name].sum()) < site.original_num_units
            if site is not None and can_reshape and site.name not in special.reshaped:
                reshape_(base.get_submodule(site.name), site, int(kept[site.name].sum()), undo)
                special.reshaped.append(site.name)
            elif emptied and not special.bypassed:
                for bare in emptied:
                    bypass_(base, bare, undo)
                    special.bypassed.append(bare.name)
            else:
                where = f" at site {site.name}" if site is not None else ""
                place = place_of(error, base.get_submodule(running[-1] if running else ""))
                raise RemovalError(
                    f"{type(base).__name__} does not run with fewer units{where}: its code counts on all of them "
                    f"({place}: {' '.join(str(error).split())[:120]}); leave the site whole, or gate its units "
                    "with `secateur.gated`, which works, as scoring does; the model is unchanged"
                ) from error
