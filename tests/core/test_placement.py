import itertools

import pytest
import torch

from internlm.core.placement import box_shape, boxes_of_interval


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (3, 2, 2, 5), ()])
def test_boxes_cover_every_interval_exactly_in_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape)
    flat = tensor.flatten()
    for start, stop in itertools.combinations(range(len(flat) + 1), 2):
        boxes = boxes_of_interval(shape, start, stop)
        pieces = [tensor[tuple(slice(*side) for side in box)] for box, _, _ in boxes]
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), flat[start:stop])
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        for (box, low, high), piece in zip(boxes, pieces, strict=True):
            assert tuple(piece.shape) == box_shape(box)
            assert torch.equal(piece.flatten(), flat[low:high])


def test_an_empty_interval_has_no_box() -> None:
    assert boxes_of_interval((4, 4), 5, 5) == []
