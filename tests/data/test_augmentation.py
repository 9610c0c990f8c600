"""Views: named, replayable, one for each sample."""

import torch

from cakd_cli.data.images.augmentation import draw_views, epoch_key, num_views, sample_seed, take_views


def test_every_view_is_the_crop_and_flip_that_its_number_says():
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    for padding, flip in ((0, False), (0, True), (2, False), (2, True)):
        padded = torch.nn.functional.pad(images, [padding] * 4)
        seen = set()
        for view in range(num_views(padding, flip)):
            crop, mirrored = (view // 2, view % 2) if flip else (view, 0)
            y, x = divmod(crop, 2 * padding + 1)
            expected = padded[:, :, y : y + 6, x : x + 7]
            expected = expected.flip(3) if mirrored else expected

            answer = take_views(
                padded.permute(0, 2, 3, 1).contiguous(),
                torch.arange(5),
                torch.full((5,), view),
                padding=padding,
                flip=flip,
            )

            assert torch.equal(answer, expected), (padding, flip, view)
            seen.add((y, x, mirrored))
        assert len(seen) == num_views(padding, flip) == (2 * padding + 1) ** 2 * (2 if flip else 1)


def test_batches_are_channels_last():
    padded = torch.zeros(4, 10, 10, 3, dtype=torch.uint8)

    images = take_views(padded, torch.arange(4), torch.zeros(4, dtype=torch.long), padding=1, flip=False)

    assert images.is_contiguous(memory_format=torch.channels_last)


def test_views_depend_on_seed_epoch_and_sample_alone():
    settings = {"padding": 4, "flip": True}
    index = torch.arange(1000)
    views = draw_views(index, seed=1, epoch=2, **settings)

    assert torch.equal(views[500:], draw_views(index[500:], seed=1, epoch=2, **settings))
    assert (views != draw_views(index, seed=2, epoch=2, **settings)).float().mean() > 0.9
    assert (views != draw_views(index, seed=1, epoch=3, **settings)).float().mean() > 0.9


def test_views_are_spread_evenly():
    index = torch.arange(200_000)
    for epoch in (0, 1, 239):
        counts = draw_views(index, seed=0, epoch=epoch, padding=4, flip=True).bincount(minlength=162).double()
        expected = len(index) / 162
        # Chi-square with 161 degrees of freedom exceeds 250 once in 100,000 fair draws.
        assert ((counts - expected) ** 2 / expected).sum() < 250


def test_epochs_of_one_sample_are_not_correlated():
    views = torch.stack([draw_views(torch.arange(500), seed=0, epoch=e, padding=4, flip=True) for e in range(162)])
    distinct = torch.tensor([len(column.unique()) for column in views.unbind(1)]).double()

    # 162 draws from 162 views meet 162 (1 - (1 - 1/162)^162) = 102.6 of them on average.
    assert abs(distinct.mean().item() - 102.6) < 1


def test_tensor_and_integer_hashes_are_one_function():
    index = torch.arange(100)
    views = draw_views(index, seed=5, epoch=9, padding=4, flip=True)

    assert [sample_seed(5, 9, i) % 162 for i in range(100)] == views.tolist()
    assert epoch_key(5, 9) != epoch_key(9, 5)
