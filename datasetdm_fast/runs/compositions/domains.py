"""Domains a picture can be moved to: hours, weathers and seasons, and the words that ask for them."""

import re
from collections.abc import Sequence

from datasetdm_fast.engine.scenes.world import WHERE
from datasetdm_fast.errors import Refused, nearest

DOMAINS = {  # name -> what a prompt ends with
    **WHERE,
    "dawn": " at dawn",
    "dusk": " at dusk",
    "rain": " in the rain",
    "snow": " in the snow",
    "autumn": " in autumn",
    "winter": " in winter",
}
_SAID = re.compile(r"\s+(?:" + "|".join(re.escape(said.strip()) for said in DOMAINS.values() if said) + r")\b")


def check_domains(names: Sequence[str]) -> None:
    """Refuses an empty list and names of no domain."""
    known = ", ".join(DOMAINS)
    if not names:
        raise Refused("--domain: no domain was named", f"Choose from {known}.")
    for name in names:
        if name not in DOMAINS:
            raise Refused(f"--domain {name}: unknown domain{nearest(name, DOMAINS)}", f"Choose from {known}.")


def moved(prompt: str, domain: str) -> str:
    """The prompt with the words of this domain at its end, in place of those of others."""
    return _SAID.sub("", prompt).rstrip(" .,;") + DOMAINS[domain]
