"""From upstream to us, one technique a rung, every rung judged and timed with the others."""

from __future__ import annotations

from bench.peers import PEERS, Offer
from bench.peers.engine import EnginePeer
from bench.peers.upstream import Upstream, lean_decoders
from bench.setting import Setting
from datasetdm_fast.engines import build_engine
from datasetdm_fast.engines.fast import FastEngine
from datasetdm_fast.models.plain import PLAIN


def without_maps(setting: Setting, batch: int) -> Upstream:
    return Upstream(setting, forms_maps=False)


def with_lean_decoders(setting: Setting, batch: int) -> Upstream:
    return Upstream(setting, forms_maps=False, has_naive_decoders=False)


def in_batches(setting: Setting, batch: int) -> EnginePeer:
    """The modules of diffusers still, under our loop."""
    engine = build_engine("torch", setting.model, lean_decoders(setting), device=str(setting.device))
    return EnginePeer(engine, setting, batch)


def lean(setting: Setting, batch: int) -> EnginePeer:
    """Our networks with the operations of PyTorch."""
    engine = FastEngine(setting.model, setting.reference.decoders, device=str(setting.device), ops=PLAIN)
    return EnginePeer(engine, setting, batch)


# Each rung has everything the one before it has.
RUNGS = {
    "upstream": PEERS["upstream"]._replace(title="DatasetDM as written"),
    "maps once": Offer("attention maps formed in one call alone", without_maps, batch=1),
    "decoders": Offer("decoders project before they resize", with_lean_decoders, batch=1),
    "batches": Offer("16 images at a time", in_batches, batch=16),
    "lean": Offer("networks without repeated work", lean, batch=16),
    "ours": PEERS["ours"]._replace(title="operations in one pass each"),
    "ours-bf16": PEERS["ours-bf16"]._replace(title="16 bits"),
}
