"""Licences that models and decoders carry: what they allow, what they ask for, and which of them contradict another."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

UNKNOWN, OTHER = "unknown", "other"  # as model hubs call them
DERIVED = "Whether the licence of weights also covers their outputs is disputed; this table assumes that it does."


@dataclass(frozen=True)
class Licence:
    """What a licence says of what is derived from a work."""

    hub: str  # its identifier on model hubs
    name: str
    is_commercial: bool = True  # whether commercial use is allowed
    allows_changes: bool = True  # whether changed copies may be passed on
    keeps_licence: bool = False  # whether they have to carry the same licence
    restricts_use: bool = False  # whether some uses are forbidden to all that receive it
    asks: str = "copyright notice and licence text"

    @property
    def row(self) -> str:
        """Its cells of the card's table."""
        use = (
            "no"
            if not self.is_commercial
            else "yes, within its list of forbidden uses"
            if self.restricts_use
            else "yes"
        )
        changes = "no" if not self.allows_changes else "under the same licence" if self.keeps_licence else "yes"
        return f"{self.name} | {use} | {changes} | {self.asks}"


CREDIT = "naming the author, the licence and changes"
RULES = "passing on its list of forbidden uses"
KNOWN = {
    licence.hub: licence
    for licence in (
        Licence("apache-2.0", "Apache 2.0", asks="licence text, notices, and naming changes"),
        Licence("mit", "MIT"),
        Licence("bsd-3-clause", "BSD 3-Clause"),
        Licence("cc0-1.0", "CC0 1.0", asks="nothing"),
        Licence("cc-by-4.0", "CC BY 4.0", asks=CREDIT),
        Licence("cc-by-sa-4.0", "CC BY-SA 4.0", keeps_licence=True, asks=CREDIT),
        Licence("cc-by-nc-4.0", "CC BY-NC 4.0", is_commercial=False, asks=CREDIT),
        Licence("cc-by-nc-sa-4.0", "CC BY-NC-SA 4.0", is_commercial=False, keeps_licence=True, asks=CREDIT),
        Licence("cc-by-nc-nd-4.0", "CC BY-NC-ND 4.0", is_commercial=False, allows_changes=False, asks=CREDIT),
        Licence("creativeml-openrail-m", "CreativeML Open RAIL-M", restricts_use=True, asks=RULES),
        Licence("openrail++", "CreativeML Open RAIL++-M", restricts_use=True, asks=RULES),
        Licence("gpl-3.0", "GNU GPL 3.0", keeps_licence=True, asks="licence text and source"),
        Licence("agpl-3.0", "GNU AGPL 3.0", keeps_licence=True, asks="licence text and source, over a network too"),
    )
}
# Of weights alone, by the names that their cards give them beside a licence "other".
KNOWN |= {
    "flux-1-dev-non-commercial-license": Licence(
        OTHER, "FLUX.1 [dev] Non-Commercial", is_commercial=False, restricts_use=True, asks=RULES
    ),
    "flux-non-commercial-license": Licence(
        OTHER, "FLUX Non-Commercial", is_commercial=False, restricts_use=True, asks=RULES
    ),
    "sai-nc-community": Licence(
        OTHER, "Stability AI Non-Commercial", is_commercial=False, restricts_use=True, asks=RULES
    ),
    "stabilityai-ai-community": Licence(
        OTHER,
        "Stability AI Community",
        restricts_use=True,
        asks="registration, and a licence of its own from a yearly revenue of 1,000,000 $ on",
    ),
}
OTHER_NAMES = {
    "apache license 2.0": "apache-2.0",
    "apache 2.0": "apache-2.0",
    "mit license": "mit",
    "cc0": "cc0-1.0",
    "cc by 4.0": "cc-by-4.0",
    "cc by-sa 4.0": "cc-by-sa-4.0",
    "cc by-nc 4.0": "cc-by-nc-4.0",
    "cc by-nc-sa 4.0": "cc-by-nc-sa-4.0",
    "creativeml open rail-m": "creativeml-openrail-m",
    "openrail-m": "creativeml-openrail-m",
    "creativeml open rail++-m": "openrail++",
    "gplv3": "gpl-3.0",
}


BEGIN = 400  # letters of a licence's own text in which it says its name
TITLES = (  # in such texts; what another one contains stands after it
    ("apache license version 2.0", "apache-2.0"),
    ("creativeml open rail++-m", "openrail++"),
    ("creativeml open rail-m", "creativeml-openrail-m"),
    ("mit license", "mit"),
    ("bsd 3-clause license", "bsd-3-clause"),
    ("gnu affero general public license version 3", "agpl-3.0"),
    ("gnu general public license version 3", "gpl-3.0"),
    ("cc0 1.0 universal", "cc0-1.0"),
    ("attribution-noncommercial-sharealike 4.0", "cc-by-nc-sa-4.0"),
    ("attribution-noncommercial-noderivatives 4.0", "cc-by-nc-nd-4.0"),
    ("attribution-noncommercial 4.0", "cc-by-nc-4.0"),
    ("attribution-sharealike 4.0", "cc-by-sa-4.0"),
    ("attribution 4.0 international", "cc-by-4.0"),
    ("flux.1 [dev] non-commercial license", "flux-1-dev-non-commercial-license"),
    ("flux non-commercial license", "flux-non-commercial-license"),
    ("stability ai community license", "stabilityai-ai-community"),
    ("stability ai non-commercial", "sai-nc-community"),
)


def licence_of(text: str) -> Licence | None:
    """The licence that a text names or is the text of, None where it is none of the known ones."""
    name = " ".join(text[: 2 * BEGIN].lower().split())
    if licence := KNOWN.get(OTHER_NAMES.get(name, name)):
        return licence
    begin = name[:BEGIN]
    return next((KNOWN[hub] for title, hub in TITLES if title in begin), None)


def hub_names(texts: Iterable[str]) -> list[str]:
    """What the header of a card names as its licences, every one once."""
    return sorted({licence.hub if (licence := licence_of(text)) else UNKNOWN for text in texts})


def conflicts(texts: Iterable[str]) -> Iterator[str]:
    """A sentence for each pair of licences that cannot both be kept, and for each that forbids a set like this one.

    >>> list(conflicts(["cc-by-sa-4.0", "CC BY-NC-SA 4.0"]))
    ['CC BY-SA 4.0 and CC BY-NC-SA 4.0 conflict: each asks that what is derived carries it alone.']
    """
    licences = {licence.name: licence for text in texts if (licence := licence_of(text))}
    for licence in licences.values():
        if not licence.allows_changes:
            yield f"{licence.name} does not allow to pass on what is derived from it."
    for first, second in combinations(licences.values(), 2):
        if first.keeps_licence and second.keeps_licence:
            yield f"{first.name} and {second.name} conflict: each asks that what is derived carries it alone."
        for strict, added in ((first, second), (second, first)):
            pair = f"{strict.name} and {added.name} conflict"
            if strict.keeps_licence and not added.keeps_licence:
                if strict.is_commercial and not added.is_commercial:
                    yield f"{pair}: the first lets everyone use it for money, the second nobody."
                elif added.restricts_use:
                    yield f"{pair}: the first lets no rules be added, the second asks for some."
