"""Label maps and pictures as bytes against PyTorch, ties and NaNs included; the GPU against the CPU."""

import numpy as np
import pytest
import torch

from datasetdm_fast import _C


def scores(classes: int = 7) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 5, (3, classes, 101)).astype(np.float32)  # many ties
    values[0, 1, 0] = values[0, -1, 0] = np.nan
    values[1, :, 1] = -np.inf
    return values


@pytest.mark.parametrize("classes", [2, 7, 256])
def test_labels_are_the_first_of_the_largest(classes):
    values = scores(classes)
    labels, largest = _C.pack_labels(values)
    expected, _ = torch.from_numpy(values).max(1)
    np.testing.assert_array_equal(largest, expected.numpy())
    with_nan_last = np.where(np.isnan(values), np.inf, values)
    np.testing.assert_array_equal(labels, with_nan_last.argmax(1))
    assert labels.dtype == np.uint8


def test_more_classes_than_a_byte_holds_are_refused():
    with pytest.raises(ValueError, match="257 classes"):
        _C.pack_labels(np.zeros((1, 257, 1), np.float32))


def decoded() -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(2, 3, 1001)).astype(np.float32)
    values[0, :, :8] = (-1, 1, 0, -2, 2, np.inf, -np.inf, 0.999999)
    return values


def test_pictures_are_cut_off_as_the_engine_does():
    values = decoded()
    expected = ((torch.from_numpy(values) / 2 + 0.5).clamp(0, 1).permute(0, 2, 1) * 255).to(torch.uint8)
    np.testing.assert_array_equal(_C.pack_image(values), expected.numpy())
    values[0, 0, 0] = np.nan
    assert _C.pack_image(values)[0, 0, 0] == 0


@pytest.mark.gpu
def test_labels_on_the_gpu():
    values, stream = scores(19), torch.cuda.current_stream().cuda_stream
    source = torch.from_numpy(values).cuda()
    labels = torch.full((3, 101), 255, dtype=torch.uint8, device="cuda")
    largest = torch.full((3, 101), float("nan"), device="cuda")
    _C.pack_labels_cuda(source.data_ptr(), *values.shape, labels.data_ptr(), largest.data_ptr(), stream)
    expected = _C.pack_labels(values)
    np.testing.assert_array_equal(labels.cpu().numpy(), expected[0])
    np.testing.assert_array_equal(largest.cpu().numpy(), expected[1])
    labels.fill_(255)
    _C.pack_labels_cuda(source.data_ptr(), *values.shape, labels.data_ptr(), 0, stream)
    np.testing.assert_array_equal(labels.cpu().numpy(), expected[0])


@pytest.mark.gpu
def test_pictures_on_the_gpu():
    values = decoded()
    source = torch.from_numpy(values).cuda()
    picture = torch.full((2, 1001, 3), 7, dtype=torch.uint8, device="cuda")
    _C.pack_image_cuda(source.data_ptr(), 2, 1001, picture.data_ptr(), torch.cuda.current_stream().cuda_stream)
    np.testing.assert_array_equal(picture.cpu().numpy(), _C.pack_image(values))


def test_null_pointers_are_refused():
    for call in (
        lambda: _C.pack_labels_cuda(0, 1, 1, 1, 0, 0, 0),
        lambda: _C.pack_image_cuda(0, 1, 1, 0, 0),
        lambda: _C.mask_starts_cuda(0, 1, 1, 1, 0, 0, 0, 0),
    ):
        with pytest.raises(ValueError, match="pointer is null"):
            call()


@pytest.mark.skipif(_C.cuda_device_count() > 0, reason="a CUDA device is there")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pack_labels_cuda", (8, 1, 1, 1, 8, 8, 0)),
        ("pack_image_cuda", (8, 1, 1, 8, 0)),
        ("mask_starts_cuda", (8, 1, 4, 4, 8, 8, 8, 0)),
        ("mask_places_cuda", (8, 1, 4, 4, 8, 8, 0)),
        ("guided_step_cuda", (8, 4, False, 8, 8, 1, 8, 8, 1, 0)),
    ],
)
def test_without_a_device_each_says_what_is_missing(name, arguments):
    with pytest.raises(RuntimeError, match=f"{name}: "):
        getattr(_C, name)(*arguments)
