"""Augmentations: determinism, and what each may and may not change."""

import numpy as np
import pytest
from PIL import Image
from samples import encode, picture

from mmjax.data.augment import AUGMENTATIONS, RandAugment, RandomErasing, RandomResizedCrop
from mmjax.data.image import open_image
from mmjax.data.spec import make_augmentation
from mmjax.registry import UnknownNameError


def rng(seed=0):
    return np.random.Generator(np.random.Philox(key=[7, seed]))


def rgba(seed=0):
    image = picture(seed, (64, 64)).convert("RGBA")
    image.putalpha(Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)))
    return image


@pytest.mark.parametrize("name", AUGMENTATIONS.names())
def test_same_generator_same_image_another_another(name):
    op = make_augmentation({"name": name})
    source = rgba() if name == "icon_view" else picture(0, (64, 48))
    results = [np.asarray(op(source.copy(), rng(seed), 32)) for seed in (*range(12), 0)]
    np.testing.assert_array_equal(results[0], results[-1])
    assert any(r.shape != results[0].shape or (r != results[0]).any() for r in results[1:])


def test_boxes_follow_the_published_distribution():
    """Areas are uniform in `scale`, log aspects in `ratio`, whenever the box fits."""
    crop = RandomResizedCrop(scale=(0.1, 0.4))
    boxes = np.array([crop.box(400, 400, rng(seed)) for seed in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 400).all()
    from scipy import stats

    areas = width * height / 400**2
    assert stats.kstest(areas, stats.uniform(0.1, 0.3).cdf).pvalue > 1e-3
    logs = np.log(width / height)
    span = 2 * np.log(4 / 3)
    assert stats.kstest(logs, stats.uniform(-span / 2, span).cdf).pvalue > 1e-3


def test_crop_equals_pil_crop_and_resize():
    crop = RandomResizedCrop(scale=(0.5, 0.5))
    image = picture(1, (90, 70))
    expected = image.crop(crop.box(90, 70, rng(3))).resize((32, 32), Image.Resampling.BICUBIC)
    got = crop(image, rng(3), 32)
    difference = np.asarray(got, int) - np.asarray(expected, int)
    # `box=` lets the filter see across the crop's edge; inside they are the same.
    assert abs(difference[3:-3, 3:-3]).max() <= 1


def test_codec_scaling_stays_near_full_decoding():
    data = encode(picture(2, (1200, 900)), quality=95)
    crop = RandomResizedCrop(scale=(0.6, 1.0))
    fast = crop(open_image(data), rng(1), 64)
    opened = open_image(data)
    opened.load()
    full = crop(opened, rng(1), 64)
    scaled = open_image(data)
    crop(scaled, rng(1), 64)
    assert scaled.size != (1200, 900)  # the codec did scale
    assert abs(np.asarray(fast, int) - np.asarray(full, int)).mean() < 2


def test_erasing_leaves_the_rest_and_the_input_alone():
    image = picture(3, (64, 64))
    before = np.asarray(image).copy()
    got = np.asarray(RandomErasing(share=1.0)(image, rng(1), 64))
    changed = (got != before).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert 0 < changed.mean() < 0.4 and box.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(image), before)


def test_flip_is_a_mirror_at_its_rate():
    flip = make_augmentation({"name": "flip"})
    image = picture(4)
    mirrored = np.asarray(image)[:, ::-1]
    hits = [(np.asarray(flip(image, rng(s), 32)) == mirrored).all() for s in range(400)]
    assert 0.4 < np.mean(hits) < 0.6


def test_rand_augment_of_strength_zero_keeps_geometry_and_colour():
    image = picture(5, (48, 48))
    for seed in range(30):
        got = RandAugment(layers=1, magnitude=0)(image, rng(seed), 48)
        assert got.size == image.size


def test_icon_view_composites_on_a_light_ground():
    view = make_augmentation({"name": "icon_view", "tint": 0.0, "brightness": 0.0})
    got = np.asarray(view(rgba(), rng(2), 48))
    assert got.shape == (48, 48, 3)
    corners = got[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == corners[0]).all() and (corners >= 128).all()
    assert (got[24, 24] != corners[0]).any()


def test_bad_names_and_fields_name_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'flip'"):
        make_augmentation({"name": "flp"})
    with pytest.raises(UnknownNameError, match="did you mean 'share'"):
        make_augmentation({"name": "flip", "shar": 0.1})
    with pytest.raises(ValueError, match="scale"):
        make_augmentation({"name": "random_resized_crop", "scale": (0.0, 2.0)})


@pytest.mark.parametrize("size", [32, 48, 96])
def test_icon_view_is_neither_blurred_nor_aliased(size):
    """A small view is what a view of the same icon at four times the size averages to."""
    rough = np.random.default_rng(0).integers(0, 2, (28, 28), dtype=np.uint8) * 255
    icon = Image.fromarray(rough).resize((112, 112), Image.Resampling.NEAREST).convert("RGBA")
    large = icon.resize((448, 448), Image.Resampling.BICUBIC)
    view = make_augmentation({"name": "icon_view"})
    errors = []
    for seed in range(5):
        got = np.asarray(view(icon, rng(seed), size), float)
        fine = view(large, rng(seed), 4 * size).resize((size, size), Image.Resampling.BOX)
        errors.append(np.abs(got - np.asarray(fine, float)).mean() / np.asarray(fine).std())
    assert np.mean(errors) < 0.15, errors
