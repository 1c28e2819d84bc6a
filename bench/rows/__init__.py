"""What is measured, one measurement a file; a result file and its page hold them in this order."""

from bench.rows import (
    batches,
    chunks,
    ladder,
    layers,
    limits,
    ops,
    peers,
    profile,
    quality,
    scale,
    stages,
)

MEASUREMENTS = {
    module.MEASUREMENT.name: module.MEASUREMENT
    for module in (limits, peers, stages, ops, layers, batches, chunks, profile, ladder, quality, scale)
}
