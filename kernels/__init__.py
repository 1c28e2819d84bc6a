"""Every operation worth a kernel, one file each: `reference`, which defines it, its other forms (`plain`, `native`,
`fused`), the devices they are chosen on, block sizes, and `probe`, the inputs on which a device is checked.
"""

import sys
from types import FrameType


def _importers() -> list[str]:
    """Names of the modules on the call stack, nearest first."""
    frame: FrameType | None = sys._getframe(1)
    names = []
    while frame:
        names.append(frame.f_globals.get("__name__", ""))
        frame = frame.f_back
    return names


if __name__ == "datasetdm_fast.kernels":
    from types import SimpleNamespace

    from datasetdm_fast.kernels import (
        ada_norm,
        add_statistics,
        attention,
        attention_average,
        attention_capture,
        attention_shares,
        attention_sums,
        depth_head,
        geglu,
        group_norm_parts,
        group_norm_silu,
        guided_step,
        image_norm,
        joint_qkv,
        layer_norm,
        linear_add,
        linear_geglu,
        linear_norm,
        mask_embedding,
        mask_head,
        masked_attention,
        place_statistics,
        pyramid,
        query_attention,
        upsample_concat,
    )

    OPS = {
        "group_norm_silu": group_norm_silu,
        "layer_norm": layer_norm,
        "ada_norm": ada_norm,
        "joint_qkv": joint_qkv,
        "geglu": geglu,
        "linear_geglu": linear_geglu,
        "linear_add": linear_add,
        "add_statistics": add_statistics,
        "place_statistics": place_statistics,
        "group_norm_parts": group_norm_parts,
        "attention": attention,
        "guided_step": guided_step,
        "attention_capture": attention_capture,
        "attention_sums": attention_sums,
        "attention_shares": attention_shares,
        "attention_average": attention_average,
        "pyramid": pyramid,
        "upsample_concat": upsample_concat,
        "image_norm": image_norm,
        "masked_attention": masked_attention,
        "query_attention": query_attention,
        "linear_norm": linear_norm,
        "mask_embedding": mask_embedding,
        "mask_head": mask_head,
        "depth_head": depth_head,
    }

    # What defines each operation, naive and slow.
    reference = SimpleNamespace(**{name: op.reference for name, op in OPS.items()})

    # The same results up to rounding for a fraction of the work and memory, still in PyTorch: for any device, and for
    # training.
    plain = SimpleNamespace(**{name: getattr(op, "plain", op.reference) for name, op in OPS.items()})

    # What a CPU runs for inference: C++ where that is faster than the plain form.
    native = SimpleNamespace(
        **{**vars(plain), **{name: op.native for name, op in OPS.items() if hasattr(op, "native")}}
    )

    # Triton's kernels, of the operations that have one; on a CPU without its interpreter each is its reference.
    fused = SimpleNamespace(**{name: op.fused for name, op in OPS.items() if hasattr(op, "fused")})

# transformers imports whatever is called `kernels` to read its version, and beside a checkout that is this folder: it
# must find none.
elif not any(name.startswith("transformers.") for name in _importers()):
    raise ImportError(
        f"{__name__!r} is a source folder, not a module of its own: import datasetdm_fast.kernels instead"
    )
