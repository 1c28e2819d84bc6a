"""The compiled extension; the checks and the friendly face of the RLE functions are in mask_rle.py."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

built_with_cuda: bool

def cuda_device_count() -> int: ...
def take_times(is_on: bool) -> list[dict[str, float]]: ...
def rle_encode(masks: NDArray[np.uint8]) -> tuple[list[str], NDArray[np.int64], NDArray[np.float64]]: ...
def rle_decode(counts: str, height: int, width: int) -> NDArray[np.uint8]: ...
def rle_to_runs(counts: str, height: int, width: int) -> NDArray[np.int64]: ...
def rle_from_runs(runs: NDArray[np.int64], height: int, width: int) -> str: ...
def outlines_of_labels(labels: NDArray[np.uint8], image: NDArray[np.uint8]) -> NDArray[np.uint8]: ...
def outlines_of_depth(metres: NDArray[np.float32], image: NDArray[np.uint8]) -> NDArray[np.float32]: ...
def png_encode(pixels: NDArray[np.uint8], palette: bytes = b"") -> bytes: ...
def png_encode_words(pixels: NDArray[np.uint16]) -> bytes: ...
def count_bytes(pixels: NDArray[np.uint8]) -> NDArray[np.int64]: ...
def guided_step(
    output: NDArray[np.float32],
    latents: NDArray[np.float32],
    history: NDArray[np.float32],
    numbers: NDArray[np.float32],
) -> NDArray[np.float32]: ...
def guided_step_cuda(
    output: int,
    output_bytes: int,
    is_bfloat: bool,
    latents: int,
    history: int,
    slots: int,
    numbers: int,
    next: int,
    size: int,
    stream: int,
    rows: int = 2,
) -> None: ...
def depth_head_vector_bytes() -> list[int]: ...
@overload
def depth_head_add(
    products: NDArray[np.float32],
    bias: NDArray[np.float32],
    last: NDArray[np.float32],
    middle: int,
    logits: NDArray[np.float32],
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
@overload
def depth_head_add(
    products: NDArray[np.float64],
    bias: NDArray[np.float64],
    last: NDArray[np.float64],
    middle: int,
    logits: NDArray[np.float64],
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
@overload
def depth_head_gradient(
    products: NDArray[np.float32],
    bias: NDArray[np.float32],
    last: NDArray[np.float32],
    middle: int,
    gradient: NDArray[np.float32],
    to_products: NDArray[np.float32],
    to_bias: NDArray[np.float32],
    to_last: NDArray[np.float32],
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
@overload
def depth_head_gradient(
    products: NDArray[np.float64],
    bias: NDArray[np.float64],
    last: NDArray[np.float64],
    middle: int,
    gradient: NDArray[np.float64],
    to_products: NDArray[np.float64],
    to_bias: NDArray[np.float64],
    to_last: NDArray[np.float64],
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
def multiplies_tiles() -> bool: ...
def tiled_attention(
    q: int,
    q_strides: Sequence[int],
    k: int,
    k_strides: Sequence[int],
    v: int,
    v_strides: Sequence[int],
    out: int,
    out_strides: Sequence[int],
    images: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    scale: float,
    threads: int,
) -> None: ...
def tiled_convolution(
    x: int,
    weight: int,
    bias: int,
    residual: int,
    out: int,
    images: int,
    height: int,
    width: int,
    channels: int,
    outputs: int,
    side: int,
    threads: int,
) -> None: ...
def attention(
    storage: int,
    q: int,
    q_strides: Sequence[int],
    k: int,
    k_strides: Sequence[int],
    v: int,
    v_strides: Sequence[int],
    out: int,
    out_strides: Sequence[int],
    images: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    scale: float,
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
def group_norm(
    storage: int,
    x: int,
    weight: int,
    bias: int,
    out: int,
    images: int,
    cells: int,
    channels: int,
    groups: int,
    eps: float,
    has_silu: bool,
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
def layer_norm(
    storage: int,
    x: int,
    weight: int,
    bias: int,
    out: int,
    rows: int,
    channels: int,
    eps: float,
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
def geglu(storage: int, x: int, out: int, rows: int, channels: int, threads: int, vector_bytes: int = 0) -> None: ...
def winograd(
    x: int,
    weight: int,
    bias: int,
    residual: int,
    out: int,
    images: int,
    height: int,
    width: int,
    channels: int,
    outputs: int,
    is_doubled: bool,
    storage: int,
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
def winograd_taps(
    x: int,
    taps: int,
    bias: int,
    residual: int,
    out: int,
    memory: int,
    images: int,
    height: int,
    width: int,
    channels: int,
    outputs: int,
    is_doubled: bool,
    storage: int,
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
def winograd_memory(images: int, height: int, width: int, channels: int, storage: int, threads: int) -> int: ...
def winograd_gradient(
    x: int,
    out: int,
    weight: int,
    images: int,
    height: int,
    width: int,
    channels: int,
    outputs: int,
    threads: int,
    vector_bytes: int = 0,
) -> None: ...
def winograd_weight(
    plain: int, weight: int, channels: int, outputs: int, threads: int, vector_bytes: int = 0
) -> None: ...

class Norm:
    def __init__(self, weight: int, bias: int, channels: int, groups: int, eps: float) -> None: ...

class Linear:
    def __init__(self, weight: int, bias: int, inner: int, outputs: int, is_paired: bool = False) -> None: ...

class Convolution:
    def __init__(
        self,
        weight: int,
        bias: int,
        transformed: int,
        channels: int,
        outputs: int,
        taps: int,
        stride: int,
        padding: int,
        is_paired: bool = False,
    ) -> None: ...
    def run(
        self,
        x: int,
        bias: int,
        residual: int,
        out: int,
        images: int,
        height: int,
        width: int,
        threads: int,
        vector_bytes: int = 0,
    ) -> None: ...

class Upsample:
    def __init__(self, convolution: Convolution) -> None: ...
    def run(
        self, x: int, out: int, images: int, height: int, width: int, threads: int, vector_bytes: int = 0
    ) -> None: ...

class Resnet:
    def __init__(
        self, norm1: Norm, conv1: Convolution, norm2: Norm, conv2: Convolution, shortcut: Convolution | None
    ) -> None: ...
    def run(
        self,
        x: int,
        bias: int,
        out: int,
        images: int,
        height: int,
        width: int,
        threads: int,
        vector_bytes: int = 0,
    ) -> None: ...

class Transformer:
    def __init__(
        self,
        norm: Norm,
        norm1: Norm,
        norm2: Norm,
        norm3: Norm,
        entry: Linear,
        self_qkv: Linear,
        self_out: Linear,
        text_q: Linear,
        text_out: Linear,
        wide: Linear,
        narrow: Linear,
        exit: Linear,
        heads: int,
    ) -> None: ...
    def before(
        self, x: int, hidden: int, query: int, images: int, cells: int, threads: int, vector_bytes: int = 0
    ) -> None: ...
    def after(
        self, x: int, hidden: int, attended: int, out: int, images: int, cells: int, threads: int, vector_bytes: int = 0
    ) -> None: ...

class Step:
    def __init__(
        self,
        block: Convolution | Upsample | Resnet | Transformer,
        joins: bool = False,
        keeps: bool = False,
        parts: bool = False,
    ) -> None: ...

class UNet:
    def __init__(self, entry: Convolution, steps: Sequence[Step], norm: Norm, exit: Convolution) -> None: ...
    def sizes(self, height: int, width: int) -> list[tuple[int, int, int]]: ...
    def run(
        self,
        latents: int,
        biases: int,
        texts: Sequence[int],
        out: int,
        outputs: Sequence[int],
        queries: Sequence[int],
        images: int,
        height: int,
        width: int,
        tokens: int,
        threads: int,
        vector_bytes: int = 0,
    ) -> None: ...

class QueryLayer:
    def __init__(
        self,
        cross_query: Linear,
        cross_out: Linear,
        self_packed: Linear,
        self_out: Linear,
        wide: Linear,
        narrow: Linear,
        cross_norm: Norm,
        self_norm: Norm,
        feed_norm: Norm,
    ) -> None: ...

class QueryTransformer:
    def __init__(
        self,
        layers: Sequence[QueryLayer],
        memory: Sequence[Linear],
        positions: Linear,
        norm: Norm,
        embedding: Sequence[Linear],
        classes: Linear,
        heads: int,
    ) -> None: ...
    def run(
        self,
        content: int,
        position: int,
        level: Sequence[int],
        places: Sequence[int],
        features: Sequence[int],
        cells: Sequence[int],
        embedded: int,
        logits: int,
        images: int,
        queries: int,
        threads: int,
        vector_bytes: int = 0,
    ) -> None: ...
